"""The rows of a batch in order, and sums over equal ones without atomics: the same bits in every run.

A stable sort brings equal rows together, in the order of the batch; ``starts`` says where each run of them lies. A
short run is added up by one program. A long one is cut into chunks of 128 rows, counted from its start; a first kernel
adds up each chunk, to fp32, and whoever needs the run adds the chunks in their order. So a row that every second token
of the batch hits is summed by as many programs as it has chunks, and the order of a sum depends on the batch alone.

Rows that count for nothing (padding, out of range) get a key past the table, sort last and belong to no run.

Traffic of a sum of N rows of D: N * D once, and 8 bytes of index a row; chunks of long runs add 1/128 of that in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _faults
from ._blocks import unit_d
from ._launch import acc_type, accumulator, ceil_div, launch, next_power_of_2

# Rows of a run that one program adds up.
CHUNK = 128


@triton.jit(do_not_specialize=["N", "num_rows", "padding_idx"])
def keys_kernel(indices_ptr, keys_ptr, fault_ptr, N, num_rows, padding_idx, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    index = tl.load(indices_ptr + i, mask=inside, other=0).to(tl.int64)
    good = (index >= 0) & (index < num_rows)
    _faults.report(inside & ~good, index, fault_ptr)
    key = tl.where(good & (index != padding_idx), index, num_rows)
    tl.store(keys_ptr + i, key.to(keys_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "num_rows", "steps"])
def starts_kernel(keys_ptr, starts_ptr, N, num_rows, steps, BLOCK: tl.constexpr):
    """Where the keys in order reach each row: a search by halves, ``steps`` of which leave nothing of N."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros_like(row)
    high = low + N
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        key = tl.load(keys_ptr + middle, mask=searching, other=0)
        below = searching & (key < row)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(starts_ptr + row, low, mask=row <= num_rows)


@triton.jit(do_not_specialize=["N"])
def changes_kernel(keys_ptr, changes_ptr, N, BLOCK: tl.constexpr):
    """1 where a run begins, but the first: their sums are the numbers of the runs."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + i, mask=i < N, other=0)
    before = tl.load(keys_ptr + i - 1, mask=(i > 0) & (i < N), other=0)
    tl.store(changes_ptr + i, ((i > 0) & (key != before)).to(tl.int32), mask=i < N)


@triton.jit(do_not_specialize=["N", "num_rows"])
def runs_kernel(keys_ptr, group_ptr, starts_ptr, rows_ptr, N, num_rows, BLOCK: tl.constexpr):
    """The start and the row of each run, at its number ``group``; N and ``num_rows`` at numbers that are none's."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    group = tl.load(group_ptr + i, mask=inside, other=0)
    before = tl.load(group_ptr + i - 1, mask=inside & (i > 0), other=-1)
    first = inside & (group != before)
    tl.store(starts_ptr + group, i, mask=first)
    tl.store(rows_ptr + group, tl.load(keys_ptr + i, mask=first, other=0), mask=first)
    left_over = i > tl.load(group_ptr + N - 1)
    tl.store(starts_ptr + i, tl.zeros_like(i) + N, mask=left_over & (i <= N))
    tl.store(rows_ptr + i, (tl.zeros_like(i) + num_rows).to(rows_ptr.dtype.element_ty), mask=left_over & inside)


class Runs(NamedTuple):
    """The runs of a batch as kernels take them, and what is added up: the term of a position p is
    ``scale[p] * grads[source[p]]``, in the columns where ``largest[source[p]]`` is p."""

    grads: Tensor
    scale: Tensor | None
    source: Tensor | None
    largest: Tensor | None
    positions: Tensor
    group: Tensor
    starts: Tensor
    rows: Tensor | None
    partials: Tensor


class RunBlocks(NamedTuple):
    """How runs are added up: in what, and how many rows and columns at once."""

    ACC: tl.dtype
    CHUNK: int
    ROWS: int
    BLOCK_D: int


@triton.jit
def terms(runs, i, inside, columns, D, ACC: tl.constexpr):
    """Those of positions[i], where ``inside``, else 0: (ROWS, BLOCK_D), of ``i`` and ``inside`` (ROWS, 1)."""
    position = tl.load(runs.positions + i, mask=inside, other=0).to(tl.int64)
    row = position
    if runs.source is not None:
        row = tl.load(runs.source + position, mask=inside, other=0).to(tl.int64)
    mask = inside & (columns < D)[None, :]
    at = row * D + columns[None, :]
    value = tl.load(runs.grads + at, mask=mask, other=0.0).to(ACC)
    if runs.scale is not None:
        value *= tl.load(runs.scale + position, mask=inside, other=0.0).to(ACC)
    if runs.largest is not None:
        chosen = tl.load(runs.largest + at, mask=mask, other=-1)
        value = tl.where(chosen == position.to(tl.int32), value, 0.0)
    return value


@triton.jit
def _sum_rows(runs, start, end, columns, D, R):
    """The sum of the terms [start, end): (BLOCK_D)."""
    total = tl.zeros((R.ROWS, R.BLOCK_D), R.ACC)
    for first in range(start, end, R.ROWS):
        i = first + tl.arange(0, R.ROWS)[:, None]
        total += terms(runs, i, i < end, columns, D, R.ACC)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["N", "G"])
def chunk_sums_kernel(runs, N, G, D, UNIT: tl.constexpr, R):
    """Program (2b, j) adds up the first chunk of a long run if one starts among the positions of block b, program
    (2b + 1, j) a later chunk: there is at most one of each, as their starts are CHUNK apart. The run of the first holds
    the last position of the block, that of the other the first."""
    D = D // UNIT * UNIT
    slot = tl.program_id(0).to(tl.int64)
    block = slot // 2 * R.CHUNK
    later = slot % 2
    probe = block + (R.CHUNK - 1) * (1 - later)
    group = tl.load(runs.group + probe, mask=probe < N, other=G).to(tl.int64)
    start = tl.load(runs.starts + group, mask=group < G, other=0).to(tl.int64)
    end = tl.load(runs.starts + group + 1, mask=group < G, other=0).to(tl.int64)
    begin = start + later * tl.cdiv(block - start, R.CHUNK) * R.CHUNK
    if (end - start > R.CHUNK) & (begin >= block) & (begin < end) & (begin >= start + later):
        columns = tl.program_id(1) * R.BLOCK_D + tl.arange(0, R.BLOCK_D)
        total = _sum_rows(runs, begin, tl.minimum(begin + R.CHUNK, end), columns, D, R)
        tl.store(runs.partials + slot * D + columns, total, mask=columns < D)


@triton.jit
def run_sum(runs, start, end, columns, D, R):
    """The sum of the run [start, end): of its rows, or of its chunks after ``chunk_sums_kernel``. (BLOCK_D)"""
    if end - start <= R.CHUNK:
        total = _sum_rows(runs, start, end, columns, D, R)
    else:
        sums = tl.zeros((R.ROWS, R.BLOCK_D), R.ACC)
        for first in range(start, end, R.CHUNK * R.ROWS):
            begin = first + R.CHUNK * tl.arange(0, R.ROWS)
            slot = begin // R.CHUNK * 2 + (begin > start)
            mask = (begin < end)[:, None] & (columns < D)[None, :]
            sums += tl.load(runs.partials + slot[:, None] * D + columns[None, :], mask=mask, other=0.0)
        total = tl.sum(sums, 0)
    return total


class RowOrder(NamedTuple):
    """``positions`` (N): where the n-th in order stands in the batch. ``group`` (N): which run it is in. ``starts``
    (G + 1): where run g lies, ``[starts[g], starts[g + 1])``. ``rows`` (G): the row of each run; None if g itself is.
    """

    positions: Tensor
    group: Tensor
    starts: Tensor
    rows: Tensor | None


def key_dtype(num_rows: int) -> torch.dtype:
    """The smallest that holds a row number, and one past the last for what counts for nothing."""
    return torch.int32 if num_rows < 2**31 - 1 else torch.int64


def row_keys(indices: Tensor, num_rows: int, padding_idx: int) -> Tensor:
    """(N): the row of each position; ``num_rows`` if it counts for nothing."""
    N = indices.shape[0]
    keys = torch.empty(N, dtype=key_dtype(num_rows), device=indices.device)
    fault = _faults.word(_faults.EMBEDDING)
    launch(keys_kernel, (ceil_div(N, 1024),), indices, keys, fault, N, num_rows, padding_idx, BLOCK=1024)
    return keys


def order_keys_by_row(keys: Tensor, num_rows: int) -> RowOrder:
    """:func:`order_by_row` of what :func:`row_keys` gives."""
    N = keys.shape[0]
    ordered, positions = torch.sort(keys, stable=True)
    starts = torch.empty(num_rows + 1, dtype=torch.int64, device=keys.device)
    grid = (ceil_div(num_rows + 1, 256),)
    launch(starts_kernel, grid, ordered, starts, N, num_rows, N.bit_length(), BLOCK=256)
    return RowOrder(positions, ordered, starts, None)


def order_distinct_keys(keys: Tensor, num_rows: int) -> RowOrder:
    """:func:`order_distinct` of what :func:`row_keys` gives."""
    N = keys.shape[0]
    ordered, positions = torch.sort(keys, stable=True)
    if N == 0:
        return RowOrder(positions, positions, positions.new_zeros(1), ordered)
    changes, starts, rows = torch.empty_like(ordered), positions.new_empty(N + 1), torch.empty_like(ordered)
    launch(changes_kernel, (ceil_div(N, 512),), ordered, changes, N, BLOCK=512)
    group = torch.cumsum(changes, 0)
    launch(runs_kernel, (ceil_div(N + 1, 512),), ordered, group, starts, rows, N, num_rows, BLOCK=512)
    return RowOrder(positions, group, starts, rows)


def order_by_row(indices: Tensor, num_rows: int, padding_idx: int = -1) -> RowOrder:
    """Every row of the table is a run, most of them empty. ``indices`` (N), contiguous."""
    return order_keys_by_row(row_keys(indices, num_rows, padding_idx), num_rows)


def order_distinct(indices: Tensor, num_rows: int, padding_idx: int = -1) -> RowOrder:
    """Runs of the rows that occur, ascending; G is N, for how many there are is known to the GPU alone: those left over
    are empty, and their row is ``num_rows``. So is that of the last run, if some rows count for nothing."""
    return order_distinct_keys(row_keys(indices, num_rows, padding_idx), num_rows)


def block_d(D: int) -> int:
    """Columns that a program takes: at most 512, fewer where that would leave more than an eighth of them idle."""
    if D <= 128:
        return max(next_power_of_2(D), 16)
    return next((block for block in (512, 256) if ceil_div(D, block) * block <= D + D // 8), 128)


def run_blocks(D: int, itemsize: int, block_bytes: int, row_bytes: int) -> tuple[int, int]:
    """Rows and columns of a block of at most so many bytes; a smaller one where loads are of less than 16 bytes each,
    as a thread is to make a few loads."""
    block = min(block_d(D), row_bytes // itemsize)
    elements = block_bytes * min(unit_d(D) * itemsize, 16) // 16 // itemsize
    return min(max(elements // block, 1), 64), block


def runs_of(
    values: Tensor,
    order: RowOrder,
    scale: Tensor | None = None,
    source: Tensor | None = None,
    largest: Tensor | None = None,
) -> Runs:
    """What :func:`run_sum` takes. Of long runs the sums of chunks are made: (2 * blocks, D) in fp32 (fp64), most of it
    never written.

    Args:
        values: ``(M, D)``, contiguous.
        scale: ``(N)``, what the row of a position counts for. Default: 1.
        source: ``(N)``, the row of ``values`` that belongs to a position. Default: the position itself.
        largest: ``(M, D)``, the one position that an element of ``values`` counts for. Default: for all.
    """
    N, D = order.group.shape[0], values.shape[1]
    partials = values.new_empty((2 * ceil_div(N, CHUNK), D), dtype=accumulator(values))
    runs = Runs(values, scale, source, largest, *order, partials)
    if N > CHUNK:
        rows, block = run_blocks(D, values.itemsize, 16384, 512)
        R, G = RunBlocks(acc_type(values), CHUNK, rows, block), order.starts.shape[0] - 1
        launch(chunk_sums_kernel, (partials.shape[0], ceil_div(D, block)), runs, N, G, D, UNIT=unit_d(D), R=R)
    return runs
