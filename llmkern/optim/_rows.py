"""Exact steps of row parameters: what a dense optimizer would do, at the cost of a batch.

An optimizer takes the parameters with row gradients (``llmkern.nn.Embedding(row_grad=True)``, :func:`prepare`) out of
each group before its dense step sees them. Their states are the dense optimizer's, under the same names; what is
pending on them is made up for before anybody reads them through ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.optim
from torch import Tensor

from .. import dispatch
from ..ops import RowParameter, RowRule, RowStep, RowTable


def _of_rows(p: Tensor) -> bool:
    # isinstance asks Parameter's metaclass, which takes as long as a small step.
    return issubclass(type(p), RowParameter)


def _has_row_grad(p: Tensor) -> bool:
    return _of_rows(p) and p.grad is not None and p.grad.is_sparse


def without(group: dict[str, Any]) -> dict[str, Any]:
    """The group as the dense step is to see it. What it reads of a table whose gradient is dense is up to date."""
    if not any(map(_of_rows, group["params"])):
        return group
    dense = [p for p in group["params"] if not _has_row_grad(p)]
    for p in filter(_of_rows, dense):
        p.catch_up()
    return {**group, "params": dense}


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
        grad = p.grad
        backend = dispatch.pick("row_optim", p, options=["row_grad"])
        states, rule, numbers = _describe(optimizer, kind, group, p)
        with torch._C.DisableTorchFunctionSubclass():
            values = p.detach()
        table = p.table
        if table is None or not table.serves(values, states, rule, backend):
            # Also where another optimizer had it: that one's steps are made first.
            p.catch_up()
            table = p.table = RowTable(values, states, rule, backend)
        factor = factor_on(p.device)
        table.step(grad._indices()[0], grad._values().contiguous(), numbers, factor)
        torch.autograd.graph.increment_version(values)
        if scale:
            grad._values().mul_(factor)


def catch_up(optimizer: torch.optim.Optimizer) -> None:
    """Makes all pending steps on all row parameters and their states."""
    for group in optimizer.param_groups:
        for p in filter(_of_rows, group["params"]):
            p.catch_up()


def _describe(
    optimizer: Any, kind: str, group: dict[str, Any], p: RowParameter
) -> tuple[list[Tensor], RowRule, RowStep]:
    """The states of ``p``, made if they are missing, the rule and the step that is due, which the state's step
    counts."""
    state = optimizer.state[p]
    decay, nesterov = group["weight_decay"], bool(group.get("nesterov", False))
    if kind == "sgd":
        buffer = state.get("momentum_buffer")
        step = 1.0 if buffer is None else 2.0
        if buffer is None and group["momentum"]:
            buffer = state["momentum_buffer"] = _zeros(optimizer, p)
        states = [buffer] if group["momentum"] else []
        numbers = RowStep(step, float(group["lr"]), group["momentum"], group["dampening"], 0.0, decay)
    else:
        names = ["sum"] if kind == "adagrad" else ["exp_avg", "exp_avg_sq"]
        names += ["max_exp_avg_sq"] if group.get("amsgrad") else []
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.get_default_dtype())
        for name in names:
            if name not in state:
                state[name] = _zeros(optimizer, p)
        # Which torch keeps beside the parameters for `fused`, where reading it would wait.
        state["step"] = state["step"].cpu()
        state["step"] += 1
        states = [state[name] for name in names]
        first, second = (group["lr_decay"], 0.0) if kind == "adagrad" else map(float, group["betas"])
        numbers = RowStep(float(state["step"]), float(group["lr"]), first, second, group["eps"], decay)
    decoupled = bool(group.get("decoupled_weight_decay", False))
    penalised = kind == "adagrad" or (kind == "adam" and decay != 0 and not decoupled)
    fp32 = all(t.dtype == torch.float32 for t in (p, *states))
    closed = fp32 and not penalised and not p.replay
    return states, RowRule(kind, decoupled, bool(group["maximize"]), nesterov, closed), numbers


def _kind(optimizer: Any) -> str | None:
    for kind, base in (("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad), ("adam", torch.optim.Adam)):
        if isinstance(optimizer, base):
            return kind
    return None


def _zeros(optimizer: Any, p: Tensor) -> Tensor:
    return torch.zeros(p.shape, dtype=optimizer._state_dtype_of(p), device=p.device)


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
        plain = not module.sparse and module.max_norm is None and not module.scale_grad_by_freq
        if plain and type(module.weight) in (torch.nn.Parameter, RowParameter):
            RowParameter.adopt(module.weight, replay)
            prepared.append(name)
    return prepared
