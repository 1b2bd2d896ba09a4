"""Exact steps of row parameters: what a dense optimizer would do, at the cost of a batch.

An optimizer takes the parameters with row gradients (``llmkern.nn.Embedding(row_grad=True)``, :func:`prepare`) out of
each group before its dense step sees them. Their states are the dense optimizer's, under the same names, and like
parameters up to date for whoever reads them. What has no exact step of rows gets a dense gradient, and the dense step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.optim
from torch import Tensor

from .. import dispatch
from .._facts import accumulate_dtype
from ..ops import ROW_LOCK, RowParameter, RowRule, RowState, RowStep, RowTable, same_memory


def _of_rows(p: Tensor) -> bool:
    # isinstance asks Parameter's metaclass, which takes as long as a small step.
    return issubclass(type(p), RowParameter)


def _has_row_grad(p: Tensor) -> bool:
    return _of_rows(p) and p.grad is not None and p.grad.is_sparse


def without(group: dict[str, Any]) -> dict[str, Any]:
    """The group as the dense step is to see it."""
    if not any(map(_has_row_grad, group["params"])):
        return group
    return {**group, "params": [p for p in group["params"] if not _has_row_grad(p)]}


@torch.no_grad()
def step(
    optimizer: Any, group: dict[str, Any], factor_on: Callable[[torch.device], float | Tensor], scale: bool
) -> None:
    """Steps the parameters of ``group`` that have row gradients, times a factor; ``scale`` leaves them so."""
    kind = _kind(optimizer)
    if kind is None:
        # SparseAdam and its like: they step rows as they come, which is another optimizer.
        return
    for p in filter(_has_row_grad, group["params"]):
        with ROW_LOCK:
            factor, names = factor_on(p.device), _names(kind, group)
            state = optimizer.state[p] if names else {}
            fresh = not state if kind == "adam" else kind == "sgd" and state.get("momentum_buffer") is None
            reason = _dense_because(p, group, factor) or _odd_state(p, kind, state, [] if fresh else names)
            if reason is not None:
                dispatch.note("row_optim", "dense", reason)
                p.grad = p.grad.to_dense()
                continue
            if fresh:
                _fill(optimizer, p, kind, state, names)
            _step(p, kind, group, state, fresh, factor)
            if scale:
                p.grad._values().mul_(factor)


def catch_up(optimizer: torch.optim.Optimizer) -> None:
    """Makes all pending steps on all row parameters and their states."""
    for group in optimizer.param_groups:
        for p in filter(_of_rows, group["params"]):
            p.catch_up()


def plain(state: Any) -> Any:
    """The state of a parameter for a checkpoint: plain tensors on the same memory."""
    if not isinstance(state, dict) or not any(type(value) is RowState for value in state.values()):
        return state
    return {key: value.detach() if type(value) is RowState else value for key, value in state.items()}


def _dense_because(p: Tensor, group: dict[str, Any], factor: float | Tensor) -> str | None:
    """Why a step on rows alone would not be the optimizer's."""
    grad = p.grad
    assert grad is not None
    if p.dim() != 2 or not p.is_contiguous() or p.is_complex():
        return "serves contiguous real tables (V, D)"
    if grad.shape != p.shape or grad.dtype != p.dtype or grad.device != p.device or grad.sparse_dim() != 1:
        return "serves gradients of the table's shape, dtype and device"
    if group.get("capturable") or group.get("differentiable"):
        return "serves neither capturable nor differentiable steps"
    # Waits for a GPU, if it clips or scales. Times such a factor, zeros are NaN too.
    if isinstance(factor, Tensor) and not bool(factor.isfinite()):
        return "the norm of the gradients is not finite"
    return None


def _odd_state(p: Tensor, kind: str, state: dict[str, Any], names: list[str]) -> str | None:
    """Why the dense step, whose errors are torch's, must deal with the state that is there."""
    if not names:
        return None
    dtypes = p.dtype, accumulate_dtype(p.dtype)
    for name in names if kind == "sgd" else [*names, "step"]:
        t: Any = state.get(name)
        like = isinstance(t, Tensor) and t.layout is torch.strided and (name != "step" or t.numel() == 1)
        if like and name != "step":
            like = (t.shape, t.device) == (p.shape, p.device) and t.is_contiguous()
            like = like and t.dtype in dtypes and t.dtype == state[names[0]].dtype
        if not like:
            return f"serves states that are like the table, which {name} is not"
    return None


def _fill(optimizer: Any, p: Tensor, kind: str, state: dict[str, Any], names: list[str]) -> None:
    """The state before the first step, as torch makes it."""
    if kind == "adam":
        wide = torch.get_default_dtype() == torch.float64
        state["step"] = torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32)
    for name in names:
        state[name] = torch.zeros(p.shape, dtype=optimizer._state_dtype_of(p), device=p.device)


def _step(
    p: RowParameter, kind: str, group: dict[str, Any], state: dict[str, Any], fresh: bool, factor: float | Tensor
) -> None:
    assert p.grad is not None
    backend = dispatch.pick("row_optim", p)
    names = _names(kind, group)
    rule, numbers = _describe(p, kind, group, state, fresh)
    table = p.table
    if table is None or (table.rule, table.backend) != (rule, backend) or not _keeps(table, p, state, names):
        # Also where another optimizer had it: that one's steps are made first.
        states = [s.memory() if type(s) is RowState else s.detach() for s in map(state.__getitem__, names)]
        p.close()
        table = p.table = RowTable(p.memory(), states, rule, backend)
        state.update((name, RowState.of(s, table)) for name, s in zip(names, states, strict=True))
    if table.step(p.grad._indices()[0], p.grad._values().contiguous(), numbers, factor):
        reason = "all rows, as another tensor, an array or a process may read them: the dense optimizer's cost"
        dispatch.note("row_optim", backend, reason)


def _keeps(table: RowTable, p: RowParameter, state: dict[str, Any], names: list[str]) -> bool:
    """Whether the table is still that of this parameter and these states."""
    if len(names) != len(table.states):
        return False
    pairs = zip((p, *map(state.__getitem__, names)), (table.param, *table.states), strict=True)
    return all(getattr(t, "table", None) is table and same_memory(t, memory) for t, memory in pairs)


def _names(kind: str, group: dict[str, Any]) -> list[str]:
    """Of the states."""
    if kind == "sgd":
        return ["momentum_buffer"] if group["momentum"] else []
    if kind == "adagrad":
        return ["sum"]
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]


def _describe(
    p: RowParameter, kind: str, group: dict[str, Any], state: dict[str, Any], fresh: bool
) -> tuple[RowRule, RowStep]:
    """The rule and the step that is due, which the state's step counts."""
    decay, nesterov, lr = group["weight_decay"], bool(group.get("nesterov", False)), float(group["lr"])
    if kind == "sgd":
        numbers = RowStep(1.0 if fresh else 2.0, lr, group["momentum"], group["dampening"], 0.0, decay)
    else:
        # Which torch keeps beside the parameters for `fused`, where reading it would wait.
        state["step"] = state["step"].cpu()
        state["step"] += 1
        first, second = (group["lr_decay"], 0.0) if kind == "adagrad" else map(float, group["betas"])
        numbers = RowStep(float(state["step"]), lr, first, second, group["eps"], decay)
    decoupled = bool(group.get("decoupled_weight_decay", False))
    penalised = kind == "adagrad" or (kind == "adam" and decay != 0 and not decoupled)
    fp32 = all(t.dtype == torch.float32 for t in (p, *(state[name] for name in _names(kind, group))))
    closed = fp32 and not penalised and not p.replay
    return RowRule(kind, decoupled, bool(group["maximize"]), nesterov, closed), numbers


def _kind(optimizer: Any) -> str | None:
    for kind, base in (("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad), ("adam", torch.optim.Adam)):
        if isinstance(optimizer, base):
            return kind
    return None


def prepare(model: torch.nn.Module, replay: bool = False) -> list[str]:
    """Gives the embeddings of ``model`` row gradients, in place: parameters keep their identity, modules their class.

    Args:
        model: its ``torch.nn.Embedding`` modules (and llmkern's) without ``sparse``, ``max_norm`` and
            ``scale_grad_by_freq`` whose weight no other module holds are prepared.
        replay: asks for the dense optimizer's bits; see :class:`llmkern.nn.Embedding`. Default: ``False``.

    Returns:
        The names of the prepared modules. A table that also serves as output layer is left out: its gradient has
        every row.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    prepared = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Embedding) or holders[id(module.weight)] > 1:
            continue
        already = issubclass(type(module.weight), RowParameter)
        plain = (not module.sparse or already) and module.max_norm is None and not module.scale_grad_by_freq
        if plain and (already or type(module.weight) is torch.nn.Parameter):
            RowParameter.adopt(module.weight, replay)
            # torch's lookup asks the module for the kind of gradient, and so does DistributedDataParallel.
            module.sparse = True
            prepared.append(name)
    return prepared
