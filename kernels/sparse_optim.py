"""Optimizer steps on the rows of a table that have a gradient.

The batch is sorted by row (``_row_order``). A program takes a run of equal rows and 512 columns of it at most, adds up
the run's gradients in registers and steps the row while the sum is there. How many runs there are the GPU alone knows:
there is a program for each position, and those without a run end at once. If an index is out of range its key sorts
last, so that every program sees it in two loads, and none writes.

Traffic: each gradient, and each parameter and state that takes part, read once and written once: 12 bytes for each
element of a gradient for row-wise Adagrad in fp32; the sort and the order of rows add some 100 bytes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _optim_rules as rules
from ._launch import acc_type, accumulator, ceil_div, launch, next_power_of_2
from ._row_order import CHUNK, RowOrder, block_d, chunk_sums, order_distinct, run_sum

# Rows of a long run that are read at once.
ROWS = 4


# A run of so many rows is added up row after row.
SHORT = tl.constexpr(8)


@triton.jit
def gradient_of_run(
    values_ptr, positions_ptr, partials_ptr, start, end, columns, D,
    ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of a run in the order of the dense gradient. (BLOCK_D)"""
    if end - start <= SHORT:
        total = tl.zeros((BLOCK_D,), ACC)
        for i in range(start, end):
            at = tl.load(positions_ptr + i).to(tl.int64) * D + columns
            total += tl.load(values_ptr + at, mask=columns < D, other=0.0).to(ACC)
    else:
        total = run_sum(
            values_ptr, None, None, positions_ptr, partials_ptr, start, end, columns, D, ACC, CHUNK, ROWS, BLOCK_D
        )
    return total


@triton.jit
def row_of_run(rows_ptr, group_ptr, run, N, V):
    """The row of a run, and whether it may be written: not if the run is empty, nor if any index is out of range."""
    last = tl.load(rows_ptr + tl.load(group_ptr + N - 1))
    row = tl.load(rows_ptr + run).to(tl.int64)
    return row, (row < V) & (last < V)


@triton.jit(do_not_specialize=["N"])
def sparse_step_kernel(
    param_ptr, s0_ptr, s1_ptr, values_ptr, positions_ptr, group_ptr, starts_ptr, rows_ptr, partials_ptr, factor_ptr,
    N, V, D,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64,
    RULE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    row, good = row_of_run(rows_ptr, group_ptr, run, N, V)
    if good:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = columns < D
        i = row * D + columns
        start, end = tl.load(starts_ptr + run), tl.load(starts_ptr + run + 1)
        g = gradient_of_run(values_ptr, positions_ptr, partials_ptr, start, end, columns, D, ACC, CHUNK, ROWS, BLOCK_D)
        p = tl.load(param_ptr + i, mask=mask).to(ACC)
        s0, s1, s2 = rules.load_states(s0_ptr, s1_ptr, None, i, mask, p)
        numbers = rules.numbers_in(factor_ptr, n0, n1, n2, n3, n4, n5, n6, n7, n8, ACC)
        p, s0, s1, s2 = rules.update(p, g, s0, s1, s2, numbers, RULE)
        rules.store_states(s0_ptr, s1_ptr, None, i, mask, s0, s1, s2)
        tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def rowwise_adagrad_kernel(
    param_ptr, sum_ptr, values_ptr, positions_ptr, group_ptr, starts_ptr, rows_ptr, partials_ptr, factor_ptr,
    N, V, D, grad_scale: tl.float64, step_size: tl.float64, eps: tl.float64,
    ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes a whole row: if it is wider than a block, its gradients are added up once for the mean of squares
    and once more for the step."""
    run = tl.program_id(0).to(tl.int64)
    row, good = row_of_run(rows_ptr, group_ptr, run, N, V)
    if good:
        if factor_ptr is not None:
            grad_scale, step_size = tl.load(factor_ptr) * grad_scale, tl.load(factor_ptr) * step_size
        scale, speed = tl.full((), grad_scale, ACC), tl.full((), step_size, ACC)
        start, end = tl.load(starts_ptr + run), tl.load(starts_ptr + run + 1)
        g, squares = tl.zeros((BLOCK_D,), ACC), tl.zeros((BLOCK_D,), ACC)
        for begin in range(0, D, BLOCK_D):
            g = gradient_of_run(
                values_ptr, positions_ptr, partials_ptr, start, end, begin + tl.arange(0, BLOCK_D), D,
                ACC, CHUNK, ROWS, BLOCK_D,
            )  # fmt: skip
            squares = tl.fma(scale * g, scale * g, squares)
        total = tl.load(sum_ptr + row) + tl.sum(squares, 0) / D
        tl.store(sum_ptr + row, total)
        by = rules.divide(speed, rules.root(total) + tl.full((), eps, ACC)) + tl.zeros((BLOCK_D,), ACC)
        for begin in range(0, D, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D)
            if not ONE_BLOCK:
                g = gradient_of_run(
                    values_ptr, positions_ptr, partials_ptr, start, end, columns, D,
                    ACC, CHUNK, ROWS, BLOCK_D,
                )  # fmt: skip
            i = row * D + columns
            p = tl.fma(by, g, tl.load(param_ptr + i, mask=columns < D).to(ACC))
            tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["N"])
def sparse_squares_kernel(
    values_ptr, positions_ptr, group_ptr, starts_ptr, rows_ptr, partials_ptr, squares_ptr, N, V, D,
    ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """squares (N): of each run's sum, added up in fp64."""
    run = tl.program_id(0).to(tl.int64)
    _, good = row_of_run(rows_ptr, group_ptr, run, N, V)
    total = tl.zeros((BLOCK_D,), tl.float64)
    if good:
        start, end = tl.load(starts_ptr + run), tl.load(starts_ptr + run + 1)
        for begin in range(0, D, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D)
            g = gradient_of_run(
                values_ptr, positions_ptr, partials_ptr, start, end, columns, D,
                ACC, CHUNK, ROWS, BLOCK_D,
            ).to(tl.float64)  # fmt: skip
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


def _ordered(indices: Tensor, values: Tensor, V: int) -> tuple[RowOrder, Tensor]:
    """The runs of a batch that is not empty, and what their sums are made of."""
    order = order_distinct(indices, V)
    return order, chunk_sums(values, order)


def _step(
    rule: str, param: Tensor, indices: Tensor, values: Tensor, states: list[Tensor], factor: Tensor | None,
    numbers: tuple[float, ...],
) -> None:  # fmt: skip
    _check(param, indices, values, *states)
    N, (V, D) = indices.shape[0], param.shape
    if N == 0:
        return
    order, partials = _ordered(indices, values, V)
    launch(
        sparse_step_kernel, (N, ceil_div(D, block_d(D))), param, *states, *[None] * (2 - len(states)), values,
        order.positions, order.group, order.starts, order.rows, partials, factor, N, V, D, *numbers,
        RULE=rule, ACC=acc_type(param), CHUNK=CHUNK, ROWS=ROWS, BLOCK_D=block_d(D), fp_fusion=False,
    )  # fmt: skip


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


def _row_tile(D: int) -> tuple[int, int, int]:
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
    order, partials = _ordered(indices, values, V)
    some, block, warps = _row_tile(D)
    factor, scale = rules.factored(grad_scale)
    launch(
        rowwise_adagrad_kernel, (N,), param, sum, values, order.positions, order.group, order.starts, order.rows,
        partials, factor, N, V, D, scale, lr * (scale if maximize else -scale), eps,
        ACC=acc_type(param), CHUNK=CHUNK, ROWS=some, BLOCK_D=block, ONE_BLOCK=block >= D,
        num_warps=warps, fp_fusion=False,
    )  # fmt: skip


def sparse_grad_norm(indices: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """The length of the whole gradient, rows added up, as a float64 scalar."""
    _check(values[:0], indices, values)
    N, D = values.shape
    squares = torch.zeros(N, dtype=torch.float64, device=values.device)
    if N and D:
        order, partials = _ordered(indices, values, num_rows)
        launch(
            sparse_squares_kernel, (N,), values, order.positions, order.group, order.starts, order.rows, partials,
            squares, N, num_rows, D, ACC=acc_type(values), CHUNK=CHUNK, ROWS=ROWS, BLOCK_D=block_d(D),
        )  # fmt: skip
    return squares.sum().sqrt()
