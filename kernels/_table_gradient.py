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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import unit_d
from ._launch import acc_type, ceil_div, launch
from ._row_order import CHUNK, RowOrder, chunk_sums, run_sum, terms, tile

# How many times as many rows a program writes if they are zeros.
ZEROS = 4


@triton.jit
def _sum_tile(
    values_ptr, scale_ptr, source_ptr, largest_ptr, positions_ptr, group_ptr, starts_ptr, partials_ptr, out_ptr,
    tile, columns, N, G, D, BY_FREQ: tl.constexpr,
    ACC: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of ``out`` whose runs begin among the places [tile * ROWS, (tile + 1) * ROWS)."""
    # (ROWS, 1) throughout: one dimension, turned where it is used, is more than Triton 3.6 compiles at some sizes.
    place = tl.arange(0, ROWS)[:, None]
    i = tile * ROWS + place
    group = tl.load(group_ptr + i, mask=i < N, other=G).to(tl.int64)
    before = tl.load(group_ptr + i - 1, mask=(i > 0) & (i < N), other=-1).to(tl.int64)
    begins = (group < G) & (group != before)
    end = tl.load(starts_ptr + group + 1, mask=begins, other=0)
    # Of a run that is not short it is enough to know that: fewer registers are held.
    length = tl.where(begins, tl.minimum(end - i, SHORT + 1), 0).to(tl.int32)

    short = length <= SHORT
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    count = tl.where(short, length, 0)
    for k in range(tl.max(count)):
        total += terms(
            values_ptr, scale_ptr, source_ptr, largest_ptr, positions_ptr, i + k, k < count, columns, D, ACC
        )  # fmt: skip
    if BY_FREQ:
        total *= 1.0 / tl.maximum(length, 1).to(ACC)
    mask = (count > 0) & (columns < D)[None, :]
    tl.store(out_ptr + group * D + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)

    last = tl.max(tl.where(short, -1, place))
    at = last * 0 - 1
    while at < last:
        at = tl.min(tl.where(short | (place <= at), ROWS, place))
        begin = tile * ROWS + at
        row = tl.load(group_ptr + begin).to(tl.int64)
        stop = tl.load(starts_ptr + row + 1)
        sum = run_sum(
            values_ptr, scale_ptr, source_ptr, positions_ptr, partials_ptr, begin, stop, columns, D,
            ACC, CHUNK, ROWS, BLOCK_D, largest_ptr,
        )  # fmt: skip
        if BY_FREQ:
            sum *= 1.0 / (stop - begin).to(ACC)
        tl.store(out_ptr + row * D + columns, sum.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["N", "G", "sum_tiles"])
def table_gradient_kernel(
    values_ptr, scale_ptr, source_ptr, largest_ptr, positions_ptr, group_ptr, starts_ptr, partials_ptr, out_ptr,
    N, G, D, sum_tiles, column_blocks, BY_FREQ: tl.constexpr, ZEROS: tl.constexpr,
    ACC: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    D = D // UNIT * UNIT
    program = tl.program_id(0)
    tile = (program // column_blocks).to(tl.int64)
    columns = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    if tile < sum_tiles:
        _sum_tile(
            values_ptr, scale_ptr, source_ptr, largest_ptr, positions_ptr, group_ptr, starts_ptr, partials_ptr, out_ptr,
            tile, columns, N, G, D, BY_FREQ, ACC, CHUNK, SHORT, ROWS, BLOCK_D,
        )  # fmt: skip
    else:
        for k in range(ZEROS):
            row = ((tile - sum_tiles) * ZEROS + k) * ROWS + tl.arange(0, ROWS)
            start = tl.load(starts_ptr + row, mask=row < G, other=0)
            end = tl.load(starts_ptr + row + 1, mask=row < G, other=1)
            mask = (start == end)[:, None] & (columns < D)[None, :]
            zeros = tl.zeros((ROWS, BLOCK_D), out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * D + columns[None, :], zeros, mask=mask)


def gradient_tile(values: Tensor) -> tuple[int, int]:
    """Rows and columns of a program, which fix the order of a sum. Few columns: the rows of a run come one after the
    other, and all programs of it are done the sooner."""
    return tile(values.shape[1], values.itemsize, 8192, 512)


def table_gradient(
    values: Tensor,
    order: RowOrder,
    num_rows: int,
    scale: Tensor | None = None,
    source: Tensor | None = None,
    largest: Tensor | None = None,
    by_freq: bool = False,
) -> Tensor:
    """(num_rows, D), like ``values``: for each run of ``order`` the sum of its terms, as :func:`chunk_sums` describes
    them, ``by_freq`` divided by their number. With ``order.rows`` the first ``num_rows`` runs, of which none is empty;
    else all, an empty one giving zeros."""
    N, D = order.group.shape[0], values.shape[1]
    partials = chunk_sums(values, order, scale, source, largest)
    out = values.new_empty((num_rows, D))
    rows, block = gradient_tile(values)
    column_blocks = ceil_div(D, block)
    sum_tiles = ceil_div(N, rows)
    zero_tiles = 0 if order.rows is not None else ceil_div(num_rows, rows * ZEROS)
    launch(
        table_gradient_kernel, ((sum_tiles + zero_tiles) * column_blocks,), values, scale, source, largest,
        order.positions, order.group, order.starts, partials, out, N, num_rows, D, sum_tiles, column_blocks,
        BY_FREQ=by_freq, ZEROS=ZEROS, ACC=acc_type(values), CHUNK=CHUNK, SHORT=8, ROWS=rows, BLOCK_D=block,
        UNIT=unit_d(D),
    )  # fmt: skip
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
