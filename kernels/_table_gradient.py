"""The gradient of a table whose rows were looked up: dense, or the rows that occur.

Each row of the result is written once: the sum of its run, or zeros; there is no memset before and nothing is added to
memory. What costs time is not the bytes but that some rows are popular, so work is cut by places in the sorted batch:
a program takes ROWS of them and sums the runs that begin there. Runs of up to SHORT rows it adds up side by side, one
row of each at a time, so that ROWS rows are in flight though most runs have one or two; longer ones it takes one by
one, ROWS rows at a time. Runs of more than CHUNK rows come as sums of chunks, so a program reads few rows beyond its
own. The programs that write zeros follow in the same launch: they keep the memory busy while sums wait for theirs.

Traffic: N * D read once, V * D written once (N of the rows that occur).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import unit_d
from ._launch import acc_type, ceil_div, launch
from ._row_order import CHUNK, RowOrder, RunBlocks, run_blocks, run_sum, runs_of, terms

# How many times as many rows a program writes if they are zeros.
ZEROS = 4


@triton.jit
def _sum_block(runs, out_ptr, block, columns, N, G, D, BY_FREQ: tl.constexpr, SHORT: tl.constexpr, R):
    """Rows of ``out`` whose runs begin among the places [block * ROWS, (block + 1) * ROWS)."""
    # (ROWS, 1) throughout: one dimension, turned where it is used, is more than Triton 3.6 compiles at some sizes.
    place = tl.arange(0, R.ROWS)[:, None]
    i = block * R.ROWS + place
    group = tl.load(runs.group + i, mask=i < N, other=G).to(tl.int64)
    before = tl.load(runs.group + i - 1, mask=(i > 0) & (i < N), other=-1).to(tl.int64)
    begins = (group < G) & (group != before)
    end = tl.load(runs.starts + group + 1, mask=begins, other=0)
    # Of a run that is not short it is enough to know that: fewer registers are held.
    length = tl.where(begins, tl.minimum(end - i, SHORT + 1), 0).to(tl.int32)

    short = length <= SHORT
    total = tl.zeros((R.ROWS, R.BLOCK_D), R.ACC)
    count = tl.where(short, length, 0)
    for k in range(tl.max(count)):
        total += terms(runs, i + k, k < count, columns, D, R.ACC)
    if BY_FREQ:
        total *= 1.0 / tl.maximum(length, 1).to(R.ACC)
    mask = (count > 0) & (columns < D)[None, :]
    tl.store(out_ptr + group * D + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)

    last = tl.max(tl.where(short, -1, place))
    at = last * 0 - 1
    while at < last:
        at = tl.min(tl.where(short | (place <= at), R.ROWS, place))
        begin = block * R.ROWS + at
        row = tl.load(runs.group + begin).to(tl.int64)
        stop = tl.load(runs.starts + row + 1)
        sum = run_sum(runs, begin, stop, columns, D, R)
        if BY_FREQ:
            sum *= 1.0 / (stop - begin).to(R.ACC)
        tl.store(out_ptr + row * D + columns, sum.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["N", "G", "sum_blocks"])
def table_gradient_kernel(
    runs, out_ptr, N, G, D, sum_blocks, column_blocks, BY_FREQ: tl.constexpr, ZEROS: tl.constexpr, SHORT: tl.constexpr,
    UNIT: tl.constexpr, R,
):  # fmt: skip
    D = D // UNIT * UNIT
    program = tl.program_id(0)
    block = (program // column_blocks).to(tl.int64)
    columns = program % column_blocks * R.BLOCK_D + tl.arange(0, R.BLOCK_D)
    if block < sum_blocks:
        _sum_block(runs, out_ptr, block, columns, N, G, D, BY_FREQ, SHORT, R)
    else:
        for k in range(ZEROS):
            row = ((block - sum_blocks) * ZEROS + k) * R.ROWS + tl.arange(0, R.ROWS)
            start = tl.load(runs.starts + row, mask=row < G, other=0)
            end = tl.load(runs.starts + row + 1, mask=row < G, other=1)
            mask = (start == end)[:, None] & (columns < D)[None, :]
            zeros = tl.zeros((R.ROWS, R.BLOCK_D), out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * D + columns[None, :], zeros, mask=mask)


def gradient_blocks(values: Tensor) -> tuple[int, int]:
    """Rows and columns of a program, which fix the order of a sum. Few columns: the rows of a run come one after the
    other, and all programs of it are done the sooner."""
    return run_blocks(values.shape[1], values.itemsize, 8192, 512)


def table_gradient(
    values: Tensor,
    order: RowOrder,
    num_rows: int,
    scale: Tensor | None = None,
    source: Tensor | None = None,
    largest: Tensor | None = None,
    by_freq: bool = False,
) -> Tensor:
    """(num_rows, D), like ``values``: for each run of ``order`` the sum of its terms, as :func:`runs_of` describes
    them, ``by_freq`` divided by their number. With ``order.rows`` the first ``num_rows`` runs, of which none is empty;
    else all, an empty one giving zeros."""
    N, D = order.group.shape[0], values.shape[1]
    runs, out = runs_of(values, order, scale, source, largest), values.new_empty((num_rows, D))
    rows, block = gradient_blocks(values)
    column_blocks, sum_blocks = ceil_div(D, block), ceil_div(N, rows)
    zero_blocks = 0 if order.rows is not None else ceil_div(num_rows, rows * ZEROS)
    grid, R = ((sum_blocks + zero_blocks) * column_blocks,), RunBlocks(acc_type(values), CHUNK, rows, block)
    constants: dict[str, Any] = {"BY_FREQ": by_freq, "ZEROS": ZEROS, "SHORT": 8, "UNIT": unit_d(D), "R": R}
    launch(table_gradient_kernel, grid, runs, out, N, num_rows, D, sum_blocks, column_blocks, **constants)
    return out


def table_gradient_rows(
    values: Tensor, order: RowOrder, num_rows: int, scale: Tensor | None = None, source: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows that occur (R), int64, ascending, and their sums (R, D). R is a result: this waits for the GPU."""
    assert order.rows is not None
    R = order.rows.shape[0]
    if not order.rows.is_meta:
        R = int(torch.count_nonzero(order.rows < num_rows))
    return order.rows[:R].long(), table_gradient(values, order, R, scale, source)
