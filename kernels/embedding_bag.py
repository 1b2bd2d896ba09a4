"""Sums, means and maxes of bags of looked-up rows, reduced while they are read.

Traffic. Forward: each row once, at random, and each output once; one warp takes some columns of a bag, with ROWS rows
in flight. Backward: a position's gradient is that of its bag, times a factor, so the table's gradient is the sum of
_table_gradient.py whose terms are rows of ``dout``, mostly in a cache; a search by halves finds the bag of a position.
The gradient of the samples' weights reads the rows once more, a block of positions a program, of however many bags.

Offsets are checked by the forward on its way: what is out of order or out of range is reported, and kept inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _faults
from ._blocks import unit_d
from ._launch import acc_type, accumulator, ceil_div, launch, require_rows
from ._row_order import key_dtype, order_distinct_keys, order_keys_by_row, run_blocks
from ._table_gradient import table_gradient, table_gradient_rows


@triton.jit
def _bag(offsets_ptr, fault_ptr, b, N, B, span):
    """Where bag b begins and ends. ``span``: of bags of equal length, that; else how many offsets there are. The words
    after that at ``fault_ptr`` are those of the offsets."""
    if offsets_ptr is None:
        begin = b * span
        end = begin + span
    else:
        begin = tl.load(offsets_ptr + b).to(tl.int64)
        end = tl.load(offsets_ptr + b + 1, mask=b + 1 < span, other=N).to(tl.int64)
        # The last offset, which is the last bag's beginning or its end, is torch's first concern.
        past = tl.where(b + 1 < span, end, begin)
        is_last = b == B - 1
        tl.store(fault_ptr + 1, begin, mask=(b == 0) & (begin != 0))
        tl.store(fault_ptr + 2, past, mask=is_last & (past > N))
        tl.store(fault_ptr + 3, b + 1, mask=(end < begin) & ((past <= N) | (b + 1 < span)))
        begin = tl.minimum(tl.maximum(begin, 0), N)
        end = tl.minimum(tl.maximum(end, 0), N)
    return begin, end


@triton.jit
def _rows(indices_ptr, fault_ptr, i, end, V, padding_idx):
    """The rows at the positions i < end, and which of them count."""
    inside = i < end
    row = tl.load(indices_ptr + i, mask=inside, other=0).to(tl.int64)
    good = (row >= 0) & (row < V)
    _faults.report(inside & ~good, row, fault_ptr)
    return row, inside & good & (row != padding_idx)


@triton.jit(do_not_specialize=["N", "B", "span", "V", "padding_idx"])
def embedding_bag_forward_kernel(
    weight_ptr, samples_ptr, indices_ptr, offsets_ptr, out_ptr, fault_ptr, N, B, span, V, D, padding_idx, column_blocks,
    MEAN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    D = D // UNIT * UNIT
    program = tl.program_id(0)
    b = (program // column_blocks).to(tl.int64)
    columns = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = _bag(offsets_ptr, fault_ptr, b, N, B, span)
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    count = tl.zeros((ROWS,), tl.int64)
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS)
        row, present = _rows(indices_ptr, fault_ptr, i, end, V, padding_idx)
        count += present.to(tl.int64)
        mask = present[:, None] & (columns < D)[None, :]
        x = tl.load(weight_ptr + row[:, None] * D + columns[None, :], mask=mask, other=0.0).to(ACC)
        if samples_ptr is not None:
            x *= tl.load(samples_ptr + i, mask=present, other=0.0).to(ACC)[:, None]
        total += x
    sum = tl.sum(total, 0)
    if MEAN:
        sum *= 1.0 / tl.maximum(tl.sum(count, 0), 1).to(ACC)
    tl.store(out_ptr + b * D + columns, sum.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["N", "B", "span", "V", "padding_idx"])
def embedding_bag_max_forward_kernel(
    weight_ptr, indices_ptr, offsets_ptr, out_ptr, largest_ptr, fault_ptr, N, B, span, V, D, padding_idx, column_blocks,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A NaN counts for nothing, unless it leads: then nothing is larger."""
    D = D // UNIT * UNIT
    program = tl.program_id(0)
    b = (program // column_blocks).to(tl.int64)
    columns = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = _bag(offsets_ptr, fault_ptr, b, N, B, span)
    none = begin * 0 + N
    # The first row that counts, where it holds a NaN, and so far the largest element and its position.
    leader = none
    leads = tl.zeros((BLOCK_D,), tl.int32)
    best = tl.full((BLOCK_D,), float("-inf"), ACC)
    where = tl.zeros((BLOCK_D,), tl.int64) + N
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS)
        row, present = _rows(indices_ptr, fault_ptr, i, end, V, padding_idx)
        leader = tl.minimum(leader, tl.min(tl.where(present, i, N), 0))
        mask = present[:, None] & (columns < D)[None, :]
        x = tl.load(weight_ptr + row[:, None] * D + columns[None, :], mask=mask, other=float("-inf")).to(ACC)
        is_nan = x != x
        leads = tl.maximum(leads, tl.max((is_nan & (i == leader)[:, None]).to(tl.int32), 0))
        x = tl.where(is_nan, float("-inf"), x)
        most = tl.max(x, 0)
        at = tl.min(tl.where(present[:, None] & ~is_nan & (x == most[None, :]), i[:, None], N), 0)
        better = (at < N) & ((most > best) | (where == N))
        best = tl.where(better, most, best)
        where = tl.where(better, at, where)
    found = leader < N
    best = tl.where(leads > 0, float("nan"), tl.where(found, best, 0.0))
    where = tl.where(leads > 0, leader, tl.where(found, where, -1))
    tl.store(out_ptr + b * D + columns, best.to(out_ptr.dtype.element_ty), mask=columns < D)
    tl.store(largest_ptr + b * D + columns, where.to(tl.int32), mask=columns < D)


@triton.jit(do_not_specialize=["N", "B", "span", "V", "padding_idx", "steps"])
def embedding_bag_terms_kernel(
    indices_ptr, offsets_ptr, samples_ptr, present_ptr, keys_ptr, bag_ptr, scale_ptr, fault_ptr,
    N, B, span, V, padding_idx, steps, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each position: the row, or V if it counts for nothing, the bag, and what the bag's gradient counts for."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if offsets_ptr is None:
        bag = i // span
        begin = bag * span
        end = begin + span
    else:
        # The last of the bags that begin at i or before; of several, all but it are empty.
        low = tl.zeros_like(i)
        high = low + B
        for _ in range(steps):
            searching = low < high
            middle = (low + high) // 2
            before = searching & (tl.load(offsets_ptr + middle, mask=searching, other=0) <= i)
            low = tl.where(before, middle + 1, low)
            high = tl.where(before, high, middle)
        bag = tl.maximum(low - 1, 0)
        # Without bags nothing lies in one.
        begin = tl.load(offsets_ptr + bag, mask=(i < N) & (bag < B), other=N).to(tl.int64)
        end = tl.load(offsets_ptr + bag + 1, mask=(i < N) & (bag + 1 < span), other=N).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), N)
        end = tl.minimum(tl.maximum(end, 0), N)
    row, present = _rows(indices_ptr, fault_ptr, i, N, V, padding_idx)
    present = present & (begin <= i) & (i < end)
    tl.store(keys_ptr + i, tl.where(present, row, V).to(keys_ptr.dtype.element_ty), mask=i < N)
    tl.store(bag_ptr + i, bag.to(tl.int32), mask=i < N)
    if scale_ptr is not None:
        scale = tl.zeros_like(i).to(scale_ptr.dtype.element_ty) + 1.0
        if samples_ptr is not None:
            scale *= tl.load(samples_ptr + i, mask=i < N, other=0.0).to(scale_ptr.dtype.element_ty)
        if MEAN:
            count = end - begin
            if present_ptr is not None:
                count = tl.load(present_ptr + end - 1, mask=present, other=0)
                count -= tl.load(present_ptr + begin - 1, mask=present & (begin > 0), other=0)
            scale *= 1.0 / tl.maximum(count, 1).to(scale_ptr.dtype.element_ty)
        tl.store(scale_ptr + i, scale, mask=i < N)


@triton.jit(do_not_specialize=["N", "V"])
def embedding_bag_samples_backward_kernel(
    dout_ptr, weight_ptr, keys_ptr, bag_ptr, scale_ptr, dsamples_ptr, N, V, D,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    D = D // UNIT * UNIT
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(keys_ptr + i, mask=i < N, other=V).to(tl.int64)
    present = row < V
    bag = tl.load(bag_ptr + i, mask=present, other=0).to(tl.int64)
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for first in range(0, D, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D))[None, :]
        mask = present[:, None] & (columns < D)
        dout = tl.load(dout_ptr + bag[:, None] * D + columns, mask=mask, other=0.0).to(ACC)
        total += dout * tl.load(weight_ptr + row[:, None] * D + columns, mask=mask, other=0.0).to(ACC)
    dot = tl.sum(total, 1)
    if scale_ptr is not None:
        dot *= tl.load(scale_ptr + i, mask=present, other=0.0).to(ACC)
    tl.store(dsamples_ptr + i, dot.to(dsamples_ptr.dtype.element_ty), mask=i < N)


def _span(indices: Tensor, offsets: Tensor | None, num_bags: int, include_last_offset: bool) -> int:
    """How many offsets there are, or how long each bag is."""
    N = indices.shape[0]
    if offsets is not None:
        if offsets.dim() != 1 or offsets.shape[0] != num_bags + include_last_offset:
            raise ValueError("embedding_bag: expected offsets (B), or with include_last_offset (B + 1)")
        return offsets.shape[0]
    if (N % num_bags if num_bags else N) != 0:
        raise ValueError("embedding_bag: expected bags of equal length")
    return N // max(num_bags, 1)


def _check_samples(samples: Tensor | None, indices: Tensor, like: Tensor) -> None:
    if samples is not None and (samples.shape != indices.shape or samples.dtype != like.dtype):
        raise ValueError("embedding_bag: expected per_sample_weights (N) of the dtype of weight")


def embedding_bag_forward(
    weight: Tensor,
    samples: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    num_bags: int,
    mean: bool,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """(B, D): of each bag the sum of ``samples[i] * weight[indices[i]]``, for a mean divided by the number of its rows;
    zeros if it has none. Indices and offsets out of range are left out, and reported."""
    require_rows("embedding_bag", weight, "weight")
    _check_samples(samples, indices, weight)
    span = _span(indices, offsets, num_bags, include_last_offset)
    (V, D), N = weight.shape, indices.shape[0]

    out = weight.new_empty((num_bags, D))

    # Few columns and one warp: bags, however few and long, are many programs.
    rows, block = run_blocks(D, weight.itemsize, 1024 * weight.itemsize, 512)
    launch(
        embedding_bag_forward_kernel, (num_bags * ceil_div(D, block),), weight, samples, indices, offsets, out,
        _faults.word(_faults.BAG), N, num_bags, span, V, D, padding_idx, ceil_div(D, block),
        MEAN=mean, ACC=acc_type(weight), ROWS=rows, BLOCK_D=block, UNIT=unit_d(D), num_warps=1,
    )  # fmt: skip
    return out


def embedding_bag_max_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    num_bags: int,
    include_last_offset: bool,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """(B, D): of each bag and column the first of the largest elements, and its position, int32; 0 and -1 if there is
    none. As in torch a NaN wins only from the first row of a bag."""
    require_rows("embedding_bag", weight, "weight")
    span = _span(indices, offsets, num_bags, include_last_offset)
    (V, D), N = weight.shape, indices.shape[0]
    if N > 2**31 - 1:
        raise ValueError("embedding_bag: a max is taken of at most 2^31 - 1 indices")

    out = weight.new_empty((num_bags, D))
    largest = weight.new_empty((num_bags, D), dtype=torch.int32)

    # Few columns and one warp: bags, however few and long, are many programs.
    rows, block = run_blocks(D, weight.itemsize, 1024 * weight.itemsize, 512)
    launch(
        embedding_bag_max_forward_kernel, (num_bags * ceil_div(D, block),), weight, indices, offsets, out, largest,
        _faults.word(_faults.BAG), N, num_bags, span, V, D, padding_idx, ceil_div(D, block),
        ACC=acc_type(weight), ROWS=rows, BLOCK_D=block, UNIT=unit_d(D), num_warps=1,
    )  # fmt: skip
    return out, largest


def _terms(
    like: Tensor,
    samples: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    num_bags: int,
    num_weights: int,
    mean: bool,
    include_last_offset: bool,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each position (N) its row, or ``num_weights``, its bag, and what the bag's gradient counts for; None: 1."""
    _check_samples(samples, indices, like)
    span = _span(indices, offsets, num_bags, include_last_offset)
    N = indices.shape[0]

    keys = torch.empty(N, dtype=key_dtype(num_weights), device=indices.device)
    bag = torch.empty(N, dtype=torch.int32, device=indices.device)
    scaled = mean or samples is not None
    scale = torch.empty(N, dtype=accumulator(like), device=indices.device) if scaled else None
    # How many rows there are up to each position.
    present = torch.cumsum(indices != padding_idx, 0) if mean and padding_idx >= 0 else None

    launch(
        embedding_bag_terms_kernel, (ceil_div(N, 512),), indices, offsets, samples, present, keys, bag, scale,
        _faults.word(_faults.BAG), N, num_bags, span, num_weights, padding_idx, num_bags.bit_length(),
        MEAN=mean, BLOCK=512,
    )  # fmt: skip
    return keys, bag, scale


def embedding_bag_backward(
    dout: Tensor,
    samples: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    largest: Tensor | None,
    num_weights: int,
    mean: bool,
    include_last_offset: bool,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """dweight (V, D) of ``dout`` (B, D); ``largest`` is that of a max, whose gradient goes where it points."""
    require_rows("embedding_bag", dout, "dout")
    if largest is not None and (largest.shape != dout.shape or largest.dtype != torch.int32):
        raise ValueError("embedding_bag: expected largest (B, D), int32")
    call = indices, offsets, dout.shape[0], num_weights, mean, include_last_offset, padding_idx
    keys, bag, scale = _terms(dout, samples, *call)
    order = order_keys_by_row(keys, num_weights)
    return table_gradient(dout, order, num_weights, scale, bag, largest, scale_grad_by_freq)


def embedding_bag_sparse_backward(
    dout: Tensor,
    samples: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    num_weights: int,
    mean: bool,
    include_last_offset: bool,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The same for the rows that occur, but padding: rows (R), ascending, and values (R, D). Waits for R."""
    require_rows("embedding_bag", dout, "dout")
    call = indices, offsets, dout.shape[0], num_weights, mean, include_last_offset, padding_idx
    keys, bag, scale = _terms(dout, samples, *call)
    return table_gradient_rows(dout, order_distinct_keys(keys, num_weights), num_weights, scale, bag)


def embedding_bag_samples_backward(
    dout: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    mean: bool,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """dsamples (N): the product of a position's row and its bag's gradient; 0 at padding and for what is in no bag."""
    require_rows("embedding_bag", dout, "dout")
    require_rows("embedding_bag", weight, "weight")
    if dout.dtype != weight.dtype or dout.shape[1] != weight.shape[1]:
        raise ValueError("embedding_bag: expected dout (B, D) like weight (V, D)")
    (V, D), N = weight.shape, indices.shape[0]
    keys, bag, scale = _terms(
        dout, None, indices, offsets, dout.shape[0], V, mean, include_last_offset, padding_idx
    )  # fmt: skip

    dsamples = dout.new_empty(N)

    rows, block = run_blocks(D, weight.itemsize, 8192, 512)
    launch(
        embedding_bag_samples_backward_kernel, (ceil_div(N, rows),), dout, weight, keys, bag, scale, dsamples,
        N, V, D, ACC=acc_type(dout), ROWS=rows, BLOCK_D=block, UNIT=unit_d(D),
    )  # fmt: skip
    return dsamples
