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
from ._launch import acc_type, accumulator, ceil_div, launch, next_power_of_2

# Rows of a run that one program adds up.
CHUNK = 128


@triton.jit
def keys_kernel(indices_ptr, keys_ptr, fault_ptr, N, num_rows, padding_idx, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    index = tl.load(indices_ptr + i, mask=inside, other=0).to(tl.int64)
    good = (index >= 0) & (index < num_rows)
    _faults.report(inside & ~good, index, fault_ptr)
    key = tl.where(good & (index != padding_idx), index, num_rows)
    tl.store(keys_ptr + i, key.to(keys_ptr.dtype.element_ty), mask=inside)


@triton.jit
def runs_kernel(keys_ptr, group_ptr, starts_ptr, rows_ptr, N, BLOCK: tl.constexpr):
    """The start and the row of each run, at its number ``group``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    key = tl.load(keys_ptr + i, mask=inside)
    before = tl.load(keys_ptr + i - 1, mask=inside & (i > 0), other=-1)
    first = inside & (key != before)
    group = tl.load(group_ptr + i, mask=first, other=0)
    tl.store(starts_ptr + group, i, mask=first)
    tl.store(rows_ptr + group, key, mask=first)


@triton.jit
def _sum_rows(
    values_ptr, scale_ptr, source_ptr, positions_ptr, start, end, columns, D,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum over i in [start, end) of scale[p] * values[source[p]], p = positions[i]: (BLOCK_D)."""
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for first in range(start, end, ROWS):
        i = first + tl.arange(0, ROWS)
        inside = i < end
        position = tl.load(positions_ptr + i, mask=inside, other=0).to(tl.int64)
        row = position
        if source_ptr is not None:
            row = tl.load(source_ptr + position, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (columns < D)[None, :]
        value = tl.load(values_ptr + row[:, None] * D + columns[None, :], mask=mask, other=0.0).to(ACC)
        if scale_ptr is not None:
            value *= tl.load(scale_ptr + position, mask=inside, other=0.0).to(ACC)[:, None]
        total += value
    return tl.sum(total, 0)


@triton.jit
def chunk_sums_kernel(
    values_ptr, scale_ptr, source_ptr, positions_ptr, group_ptr, starts_ptr, partials_ptr, N, G, D,
    ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (2b, j) adds up the first chunk of a long run if one starts among the positions of block b, program
    (2b + 1, j) a later chunk: there is at most one of each, as their starts are CHUNK apart."""
    slot = tl.program_id(0).to(tl.int64)
    i = slot // 2 * CHUNK + tl.arange(0, CHUNK)
    group = tl.load(group_ptr + i, mask=i < N, other=G).to(tl.int64)
    known = group < G
    start = tl.load(starts_ptr + group, mask=known, other=0).to(tl.int64)
    end = tl.load(starts_ptr + group + 1, mask=known, other=0).to(tl.int64)
    here = known & (end - start > CHUNK) & ((i - start) % CHUNK == 0) & ((i > start) == (slot % 2 == 1))
    begin = tl.max(tl.where(here, i, -1), 0)
    if begin >= 0:
        stop = tl.minimum(tl.max(tl.where(here, end, 0), 0), begin + CHUNK)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _sum_rows(
            values_ptr, scale_ptr, source_ptr, positions_ptr, begin, stop, columns, D,
            ACC, ROWS, BLOCK_D,
        )  # fmt: skip
        tl.store(partials_ptr + slot * D + columns, total, mask=columns < D)


@triton.jit
def run_sum(
    values_ptr, scale_ptr, source_ptr, positions_ptr, partials_ptr, start, end, columns, D,
    ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of the run [start, end): of its rows, or of its chunks after ``chunk_sums_kernel``. (BLOCK_D)"""
    if end - start <= CHUNK:
        total = _sum_rows(
            values_ptr, scale_ptr, source_ptr, positions_ptr, start, end, columns, D,
            ACC, ROWS, BLOCK_D,
        )  # fmt: skip
    else:
        total = tl.load(partials_ptr + start // CHUNK * 2 * D + columns, mask=columns < D, other=0.0)
        for begin in range(start + CHUNK, end, CHUNK):
            slot = begin // CHUNK * 2 + 1
            total += tl.load(partials_ptr + slot * D + columns, mask=columns < D, other=0.0)
    return total


class RowOrder(NamedTuple):
    """``positions`` (N): where the n-th in order stands in the batch. ``group`` (N): which run it is in. ``starts``
    (G + 1): where run g lies, ``[starts[g], starts[g + 1])``. ``rows`` (G): the row of each run; None if g itself is.
    """

    positions: Tensor
    group: Tensor
    starts: Tensor
    rows: Tensor | None


def _sorted(indices: Tensor, num_rows: int, padding_idx: int) -> tuple[Tensor, Tensor]:
    """Keys in order and the places where they stood; a key of ``num_rows`` counts for nothing."""
    N = indices.shape[0]
    keys = torch.empty(N, dtype=torch.int32 if num_rows < 2**31 - 1 else torch.int64, device=indices.device)
    fault = _faults.word(_faults.EMBEDDING)
    launch(keys_kernel, (ceil_div(N, 1024),), indices, keys, fault, N, num_rows, padding_idx, BLOCK=1024)
    return torch.sort(keys, stable=True)


def order_by_row(indices: Tensor, num_rows: int, padding_idx: int = -1) -> RowOrder:
    """Every row of the table is a run, most of them empty. ``indices`` (N), contiguous."""
    keys, positions = _sorted(indices, num_rows, padding_idx)
    rows = torch.arange(num_rows + 1, dtype=keys.dtype, device=keys.device)
    return RowOrder(positions, keys, torch.searchsorted(keys, rows), None)


def order_distinct(indices: Tensor, num_rows: int, padding_idx: int = -1) -> RowOrder:
    """Runs of the rows that occur, ascending; G is N, for how many there are is known to the GPU alone: those left over
    are empty, and their row is ``num_rows``. So is that of the last run, if some rows count for nothing."""
    N = indices.shape[0]
    keys, positions = _sorted(indices, num_rows, padding_idx)
    group = torch.zeros_like(keys, dtype=torch.int64)
    torch.cumsum(keys[1:] != keys[:-1], 0, out=group[1:])
    starts, rows = group.new_full((N + 1,), N), keys.new_full((N,), num_rows)
    launch(runs_kernel, (ceil_div(N, 1024),), keys, group, starts, rows, N, BLOCK=1024)
    return RowOrder(positions, group, starts, rows)


def block_d(D: int) -> int:
    """Columns that a program takes: at most 512, four rows of which are 16 values a thread."""
    return min(max(next_power_of_2(D), 16), 512)


def chunk_sums(values: Tensor, order: RowOrder, scale: Tensor | None = None, source: Tensor | None = None) -> Tensor:
    """What :func:`run_sum` needs of long runs: (2 * blocks, D) in fp32 (fp64), most of it never written.

    Args:
        values: ``(M, D)``, contiguous.
        scale: ``(N)``, what the row of a position counts for. Default: 1.
        source: ``(N)``, the row of ``values`` that belongs to a position. Default: the position itself.
    """
    N, D = order.group.shape[0], values.shape[1]
    partials = values.new_empty((2 * ceil_div(N, CHUNK), D), dtype=accumulator(values))
    if N <= CHUNK:
        return partials
    launch(
        chunk_sums_kernel, (partials.shape[0], ceil_div(D, block_d(D))), values, scale, source, order.positions,
        order.group, order.starts, partials, N, order.starts.shape[0] - 1, D,
        ACC=acc_type(values), CHUNK=CHUNK, ROWS=4, BLOCK_D=block_d(D),
    )  # fmt: skip
    return partials
