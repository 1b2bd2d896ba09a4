"""Optimizer steps over many tensors at once: one launch for all that share dtypes and step count.

A program takes 1,024 elements of one tensor. Which, it finds in two tables in device memory: for each block its tensor,
and for each tensor its addresses. The tables are made on the host and sent without waiting when a pointer changes, and
kept while none does.

Traffic: parameter, gradient and states read once, all but the gradient written once, 16 bytes at a time: for Adam in
fp32 28 bytes an element, and 4 bytes of table a block. A block that its tensor does not fill is masked, the others are
not, for a mask of unknown length would cut loads to single elements.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _optim_rules as rules
from . import _tuples
from ._launch import acc_type, accumulator, ceil_div, launch, triton_type

BLOCK = 1024
# A row of a tensor in the table: its first block, elements, parameter, gradient, three states.
COLUMNS = 7
_KEPT = 64


@triton.jit
def _pointer(table_ptr, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class StepShape(NamedTuple):
    """What a step is compiled for."""

    RULE: str
    AFTER: str
    ACC: tl.dtype
    PARAM: tl.dtype
    STATE: tl.dtype
    STATES: int
    ALIGNED: bool
    COLUMNS: int
    BLOCK: int


@triton.jit
def _step_block(table_ptr, i, mask, scale, numbers, S):
    param_ptr = _pointer(table_ptr, 2, S.PARAM, S.ALIGNED)
    grad_ptr = _pointer(table_ptr, 3, S.PARAM, S.ALIGNED)
    state_ptrs = ()
    for k in tl.static_range(S.STATES):
        state_ptrs += (_pointer(table_ptr, 4 + k, S.STATE, S.ALIGNED),)
    p = tl.load(param_ptr + i, mask=mask).to(S.ACC)
    g = tl.load(grad_ptr + i, mask=mask).to(S.ACC)
    p, states = rules.update(p, g, _tuples.load(state_ptrs, i, mask, S.ACC), numbers, S.RULE)
    _tuples.store(state_ptrs, i, states, mask)
    tl.store(param_ptr + i, p.to(S.PARAM), mask=mask)
    if S.AFTER == "zero":
        tl.store(grad_ptr + i, tl.zeros_like(p).to(S.PARAM), mask=mask)
    if S.AFTER == "scale":
        tl.store(grad_ptr + i, (scale * g).to(S.PARAM), mask=mask)


@triton.jit
def optim_step_kernel(
    table_ptr, tensor_of_ptr, factor_ptr, scale: tl.float64,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64, S,
):  # fmt: skip
    block = tl.program_id(0)
    table_ptr += tl.load(tensor_of_ptr + block) * S.COLUMNS
    begin = (block - tl.load(table_ptr)) * S.BLOCK
    n = tl.load(table_ptr + 1)
    numbers = rules.numbers_in(factor_ptr, (n0, n1, n2, n3, n4, n5, n6, n7, n8), S.ACC)
    if factor_ptr is not None:
        scale = tl.load(factor_ptr) * scale
    scale = tl.full((), scale, S.ACC)
    i = begin + tl.arange(0, S.BLOCK)
    if begin + S.BLOCK <= n:
        _step_block(table_ptr, i, None, scale, numbers, S)
    else:
        _step_block(table_ptr, i, i < n, scale, numbers, S)


class _Tables:
    """What was sent to a device, by what it was made of; the least recently used goes first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Tensor] = OrderedDict()
        # A replay of a graph sends its tables again.
        self._captured: list[Tensor] = []

    def __call__(self, key: Any, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        key = (key, device)
        if key not in self._kept:
            table = make()
            if device.type == "cuda":
                # From pinned memory, which torch keeps until the copy is done, a copy does not wait.
                table = table.pin_memory()
                if torch.cuda.is_current_stream_capturing():
                    self._captured.append(table)
                    return table.to(device, non_blocking=True)
            self._kept[key] = table.to(device, non_blocking=True)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


_tables = _Tables()


def _tensor_of(sizes: tuple[int, ...]) -> Tensor:
    """For each block the number of its tensor."""
    blocks = torch.tensor([ceil_div(n, BLOCK) for n in sizes], device="cpu")
    return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), blocks)


def _addresses(sizes: tuple[int, ...], pointers: tuple[int, ...]) -> Tensor:
    """(P, COLUMNS): the table of tensors. ``pointers``: five for each."""
    own, addresses = torch.tensor(sizes, device="cpu"), torch.tensor(pointers, device="cpu")
    blocks = torch.tensor([ceil_div(n, BLOCK) for n in sizes], device="cpu")
    return torch.cat([(blocks.cumsum(0) - blocks)[:, None], own[:, None], addresses.view(-1, 5)], 1)


def _step_alike(
    rule: str, numbers: tuple[float, ...], after: str, factor: Tensor | None, scale: float, lists: list[list[Tensor]]
) -> None:
    """One launch. ``lists``: parameters, gradients and the rule's states, each of one dtype."""
    params = lists[0]
    states = len(lists) - 2
    sizes = tuple(p.numel() for p in params)
    pointers = tuple(a for own in zip(*lists, strict=True) for a in (*(t.data_ptr() for t in own), *[0] * (3 - states)))
    device = params[0].device
    table = _tables((sizes, pointers), device, lambda: _addresses(sizes, pointers))
    tensor_of = _tables(sizes, device, lambda: _tensor_of(sizes))
    aligned, p, state = all(pointer % 16 == 0 for pointer in pointers), params[0], lists[-1][0]
    S = StepShape(rule, after, acc_type(p), triton_type(p), triton_type(state), states, aligned, COLUMNS, BLOCK)
    launch(optim_step_kernel, tuple(tensor_of.shape), table, tensor_of, factor, scale, *numbers, S=S, fp_fusion=False)


def _check(name: str, lists: Sequence[list[Tensor]], steps: list[float], after: str) -> None:
    """That memory is not touched outside tensors; ``lists`` begins with parameters, gradients and states."""
    if after not in ("keep", "zero", "scale"):
        raise ValueError(f"after: got {after!r}, expected keep, zero or scale")
    if {len(steps), *map(len, lists)} != {len(steps)}:
        raise ValueError(f"{name}: expected as many gradients, states and steps as parameters")
    for p, grad, *states in zip(*lists, strict=True):
        types = {state.dtype for state in states}
        good = len(types) < 2 and types <= {p.dtype, accumulator(p)} and grad.dtype == p.dtype
        good = good and all(t.numel() == p.numel() and t.is_contiguous() for t in (p, grad, *states))
        if not good or any(t.device != p.device for t in (grad, *states)):
            raise ValueError(
                f"{name}: expected contiguous tensors of the parameter's device and number of elements, gradients of"
                " its dtype, and states of its dtype or float32 (float64 for float64)"
            )


def _step(
    rule: str, lists: Sequence[list[Tensor]], steps: list[float],
    numbers: Callable[[float, float], tuple[float, ...]], after: str, grad_scale: float | Tensor,
) -> None:  # fmt: skip
    """Steps tensors by kinds: those that share dtypes and step count in one launch."""
    factor, scale = rules.factored(grad_scale)
    kinds: dict[Any, list[int]] = {}
    for i, tensors in enumerate(zip(*lists, strict=True)):
        kinds.setdefault((tensors[0].dtype, tensors[-1].dtype, tensors[0].device, steps[i]), []).append(i)
    for (*_, step), members in kinds.items():
        _step_alike(rule, numbers(step, scale), after, factor, scale, [[each[i] for i in members] for each in lists])


def advance(steps: list[Tensor]) -> list[float]:
    """Counts one step more in each, and gives the counts. Tensors on the CPU, as torch keeps them."""
    torch._foreach_add_(steps, 1)
    return [float(step) for step in steps]


def adam_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], steps: list[float], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, maximize: bool, grad_scale: float | Tensor, after: str,
) -> None:  # fmt: skip
    """Adam or AdamW in place; ``max_exp_avg_sqs`` is empty without amsgrad. See :mod:`llmkern.reference.optim`."""
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else [])]
    _check("adam_step", lists, steps, after)

    def numbers(step: float, scale: float) -> tuple[float, ...]:
        return rules.adam(step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize, scale)

    _step("amsgrad" if max_exp_avg_sqs else "adam", lists, steps, numbers, after, grad_scale)


def sgd_step(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], steps: list[float], lr: float,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, grad_scale: float | Tensor,
    after: str,
) -> None:  # fmt: skip
    """SGD in place; ``momentum_buffers``, if there are any, are only written by step 1."""
    lists = [params, grads, *([momentum_buffers] if momentum_buffers else [])]
    _check("sgd_step", lists, steps, after)

    def numbers(step: float, scale: float) -> tuple[float, ...]:
        return rules.sgd(step, lr, momentum, dampening, weight_decay, nesterov, maximize, scale)

    # All later steps are one kind.
    kinds = [min(step, 2.0) for step in steps]
    _step("momentum" if momentum_buffers else "sgd", lists, kinds, numbers, after, grad_scale)


def adagrad_step(
    params: list[Tensor], grads: list[Tensor], sums: list[Tensor], steps: list[float], lr: float, lr_decay: float,
    weight_decay: float, eps: float, maximize: bool, grad_scale: float | Tensor, after: str,
) -> None:  # fmt: skip
    """Adagrad in place."""
    lists = [params, grads, sums]
    _check("adagrad_step", lists, steps, after)

    def numbers(step: float, scale: float) -> tuple[float, ...]:
        return rules.adagrad(step, lr, lr_decay, weight_decay, eps, maximize, scale)

    _step("adagrad", lists, steps, numbers, after, grad_scale)
