"""Optimizer steps on the rows of a table that have a gradient.

The batch is sorted by row (``_row_order``). A program takes a run of equal rows and 512 columns of it at most, adds up
the run's gradients in registers and steps the row while the sum is there. How many runs there are the GPU alone knows:
there is a program for each position, and those without a run end at once. If an index is out of range its key sorts
last, so that every program sees it in two loads, and none writes.

Traffic: each gradient, and each parameter and state that takes part, read once and written once: 12 bytes for each
element of a gradient for row-wise Adagrad in fp32; the sort and the order of rows add some 100 bytes a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _optim_rules as rules
from . import _tuples
from ._launch import acc_type, accumulator, ceil_div, launch, next_power_of_2
from ._row_order import CHUNK, RunBlocks, Runs, block_d, order_distinct, run_sum, runs_of

# Rows of a long run that are read at once.
ROWS = 4


# A run of so many rows is added up row after row.
SHORT = tl.constexpr(8)


@triton.jit
def gradient_of_run(runs, run, columns, D, R):
    """The sum of a run in the order of the dense gradient. (BLOCK_D)"""
    start, end = tl.load(runs.starts + run), tl.load(runs.starts + run + 1)
    if end - start <= SHORT:
        total = tl.zeros((R.BLOCK_D,), R.ACC)
        for i in range(start, end):
            at = tl.load(runs.positions + i).to(tl.int64) * D + columns
            total += tl.load(runs.grads + at, mask=columns < D, other=0.0).to(R.ACC)
    else:
        total = run_sum(runs, start, end, columns, D, R)
    return total


@triton.jit
def row_of_run(runs, run, N, V):
    """The row of a run, and whether it may be written: not if the run is empty, nor if any index is out of range."""
    last = tl.load(runs.rows + tl.load(runs.group + N - 1))
    row = tl.load(runs.rows + run).to(tl.int64)
    return row, (row < V) & (last < V)


@triton.jit(do_not_specialize=["N"])
def sparse_step_kernel(
    param_ptr, state_ptrs, runs, factor_ptr, N, V, D,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64, RULE: tl.constexpr, R,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    row, good = row_of_run(runs, run, N, V)
    if good:
        columns = tl.program_id(1) * R.BLOCK_D + tl.arange(0, R.BLOCK_D)
        mask = columns < D
        i = row * D + columns
        g = gradient_of_run(runs, run, columns, D, R)
        p = tl.load(param_ptr + i, mask=mask).to(R.ACC)
        states = _tuples.load(state_ptrs, i, mask, R.ACC)
        numbers = rules.numbers_in(factor_ptr, (n0, n1, n2, n3, n4, n5, n6, n7, n8), R.ACC)
        p, states = rules.update(p, g, states, numbers, RULE)
        _tuples.store(state_ptrs, i, states, mask)
        tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def rowwise_adagrad_kernel(
    param_ptr, sum_ptr, runs, factor_ptr, N, V, D, grad_scale: tl.float64, step_size: tl.float64, eps: tl.float64,
    ONE_BLOCK: tl.constexpr, R,
):  # fmt: skip
    """A program takes a whole row: if it is wider than a block, its gradients are added up once for the mean of squares
    and once more for the step."""
    run = tl.program_id(0).to(tl.int64)
    row, good = row_of_run(runs, run, N, V)
    if good:
        if factor_ptr is not None:
            grad_scale, step_size = tl.load(factor_ptr) * grad_scale, tl.load(factor_ptr) * step_size
        scale, speed = tl.full((), grad_scale, R.ACC), tl.full((), step_size, R.ACC)
        g, squares = tl.zeros((R.BLOCK_D,), R.ACC), tl.zeros((R.BLOCK_D,), R.ACC)
        for begin in range(0, D, R.BLOCK_D):
            g = gradient_of_run(runs, run, begin + tl.arange(0, R.BLOCK_D), D, R)
            squares = tl.fma(scale * g, scale * g, squares)
        total = tl.load(sum_ptr + row) + tl.sum(squares, 0) / D
        tl.store(sum_ptr + row, total)
        by = rules.divide(speed, rules.root(total) + tl.full((), eps, R.ACC)) + tl.zeros((R.BLOCK_D,), R.ACC)
        for begin in range(0, D, R.BLOCK_D):
            columns = begin + tl.arange(0, R.BLOCK_D)
            if not ONE_BLOCK:
                g = gradient_of_run(runs, run, columns, D, R)
            i = row * D + columns
            p = tl.fma(by, g, tl.load(param_ptr + i, mask=columns < D).to(R.ACC))
            tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["N"])
def sparse_squares_kernel(runs, squares_ptr, N, V, D, R):
    """squares (N): of each run's sum, added up in fp64."""
    run = tl.program_id(0).to(tl.int64)
    _, good = row_of_run(runs, run, N, V)
    total = tl.zeros((R.BLOCK_D,), tl.float64)
    if good:
        for begin in range(0, D, R.BLOCK_D):
            g = gradient_of_run(runs, run, begin + tl.arange(0, R.BLOCK_D), D, R).to(tl.float64)
            total += g * g
    tl.store(squares_ptr + run, tl.sum(total, 0))


def _check(param: Tensor, indices: Tensor, values: Tensor, *states: Tensor, numel: int | None = None) -> None:
    """That memory is not touched outside tensors. ``numel``: of a state, if not the parameter's."""
    good = param.dim() == values.dim() == 2 and indices.dim() == 1 and values.shape[0] == indices.shape[0]
    good = good and param.shape[1] == values.shape[1] and param.dtype == values.dtype
    good = good and indices.dtype in (torch.int32, torch.int64)
    if not good or not all(t.is_contiguous() for t in (param, indices, values, *states)):
        raise ValueError(
            "sparse step: expected contiguous param (V, D), int32 or int64 indices (N) and values (N, D) of its dtype"
        )
    wide = accumulator(param)
    types = {state.dtype for state in states}
    if (
        len(types) > 1
        or not types <= ({param.dtype, wide} if numel is None else {wide})
        or any(state.numel() != (param.numel() if numel is None else numel) for state in states)
    ):
        raise ValueError(
            "state: expected one of the parameter's shape and dtype, or float32 (float64 for float64); row-wise, a"
            " number for each row"
        )


def _runs(indices: Tensor, values: Tensor, V: int) -> Runs:
    """Of a batch that is not empty."""
    return runs_of(values, order_distinct(indices, V))


def _step(
    rule: str, param: Tensor, indices: Tensor, values: Tensor, states: list[Tensor], factor: Tensor | None,
    numbers: tuple[float, ...],
) -> None:  # fmt: skip
    _check(param, indices, values, *states)
    N, (V, D) = indices.shape[0], param.shape
    if N == 0:
        return
    grid, R = (N, ceil_div(D, block_d(D))), RunBlocks(acc_type(param), CHUNK, ROWS, block_d(D))
    arguments = param, tuple(states), _runs(indices, values, V), factor, N, V, D, *numbers
    launch(sparse_step_kernel, grid, *arguments, RULE=rule, R=R, fp_fusion=False)


def sparse_sgd_step(
    param: Tensor, indices: Tensor, values: Tensor, lr: float, maximize: bool, grad_scale: float | Tensor
) -> None:
    """p = p - lr g on the rows ``indices`` (N), whose gradients are the sums of ``values`` (N, D), in place."""
    factor, scale = rules.factored(grad_scale)
    numbers = rules.sgd(1, lr, 0, 0, 0, False, maximize, scale)
    _step("sgd", param, indices, values, [], factor, numbers)


def sparse_adagrad_step(
    param: Tensor, indices: Tensor, values: Tensor, sum: Tensor, step: float, lr: float, lr_decay: float, eps: float,
    maximize: bool, grad_scale: float | Tensor,
) -> None:  # fmt: skip
    """Adagrad, in place. See :mod:`llmkern.reference.sparse_optim`."""
    factor, scale = rules.factored(grad_scale)
    numbers = rules.adagrad(step, lr, lr_decay, 0, eps, maximize, scale)
    _step("adagrad", param, indices, values, [sum], factor, numbers)


def sparse_adam_step(
    param: Tensor, indices: Tensor, values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, lr: float,
    beta1: float, beta2: float, eps: float, maximize: bool, grad_scale: float | Tensor,
) -> None:  # fmt: skip
    """torch's SparseAdam, in place."""
    factor, scale = rules.factored(grad_scale)
    numbers = rules.sparse_adam(step, lr, beta1, beta2, eps, maximize, scale)
    _step("sparse_adam", param, indices, values, [exp_avg, exp_avg_sq], factor, numbers)


def _row_blocks(D: int) -> tuple[int, int, int]:
    """Rows, columns and warps where a program takes a whole row. A wide one in one block too, up to 4096 columns: four
    or eight elements a thread."""
    block = max(block_d(D), min(next_power_of_2(D), 4096))
    return (ROWS, block, 4) if block <= 512 else (1, block, min(block // 128, 16))


def rowwise_adagrad_step(
    param: Tensor, indices: Tensor, values: Tensor, sum: Tensor, lr: float, eps: float, maximize: bool,
    grad_scale: float | Tensor,
) -> None:  # fmt: skip
    """Adagrad with one accumulator a row, ``sum`` (V), in place."""
    _check(param, indices, values, sum, numel=param.shape[0])
    N, (V, D) = indices.shape[0], param.shape
    if N == 0:
        return
    rows, block, warps = _row_blocks(D)
    factor, scale = rules.factored(grad_scale)
    arguments = param, sum, _runs(indices, values, V), factor, N, V, D, scale, lr * (scale if maximize else -scale), eps
    constants: dict[str, Any] = {"ONE_BLOCK": block >= D, "R": RunBlocks(acc_type(param), CHUNK, rows, block)}
    launch(rowwise_adagrad_kernel, (N,), *arguments, **constants, num_warps=warps, fp_fusion=False)


def sparse_grad_norm(indices: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """The length of the whole gradient, rows added up, as a float64 scalar."""
    _check(values[:0], indices, values)
    N, D = values.shape
    squares = torch.zeros(N, dtype=torch.float64, device=values.device)
    if N and D:
        R = RunBlocks(acc_type(values), CHUNK, ROWS, block_d(D))
        launch(sparse_squares_kernel, (N,), _runs(indices, values, num_rows), squares, N, num_rows, D, R=R)
    return squares.sum().sqrt()
