"""Kernels of the fused embedding; kernels/fused_embedding.py has the idea, and launches them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _faults, _random

# What may change between calls.
_CHANGING = ["N", "P", "K", "seed", "limit", "partition_tokens", "partitions"]


class Lookup(NamedTuple):
    """One of the three tables, or none."""

    table: Tensor | None
    indices: Tensor | None
    fault: Tensor | None
    rows: int


class Lookups(NamedTuple):
    tokens: Lookup
    positions: Lookup
    types: Lookup


class FusedForward(NamedTuple):
    out: Tensor
    stats: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class FusedBackward(NamedTuple):
    dout: Tensor
    stats: Tensor
    dsum: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    norm_weight: Tensor | None


class FusedShape(NamedTuple):
    """What kernels are compiled for."""

    NORM: str
    ACC: tl.dtype
    ROWS: int
    BLOCK_D: int
    UNIT: int


@triton.jit
def _index(lookup, at, inside):
    return tl.load(lookup.indices + at, mask=inside, other=0).to(tl.int64)


@triton.jit
def _rows(lookup, index, inside, d, D, S):
    """(ROWS, BLOCK_D), zeros outside the table and its columns."""
    mask = (inside & (index >= 0) & (index < lookup.rows))[:, None] & (d < D)[None, :]
    return tl.load(lookup.table + index[:, None] * D + d[None, :], mask=mask, other=0.0).to(S.ACC)


@triton.jit
def _report(lookup, index, inside):
    _faults.report(inside & ((index < 0) | (index >= lookup.rows)), index, lookup.fault)


@triton.jit
def _sum(lookups, P, K, scale, n, inside, d, D, S):
    """scale * token + position + type of the tokens ``n``; indices of positions repeat after P, those of types after K.
    Loads keep their order in a program: first all indices, then all rows, so that as many as possible are in flight."""
    token = _index(lookups.tokens, n, inside)
    position = token if lookups.positions.table is None else _index(lookups.positions, n % P, inside)
    type_ = token if lookups.types.table is None else _index(lookups.types, n % K, inside)
    s = _rows(lookups.tokens, token, inside, d, D, S) * tl.full((), scale, S.ACC)
    if lookups.positions.table is not None:
        s += _rows(lookups.positions, position, inside, d, D, S)
    if lookups.types.table is not None:
        s += _rows(lookups.types, type_, inside, d, D, S)
        _report(lookups.types, type_, inside)
    if lookups.positions.table is not None:
        _report(lookups.positions, position, inside)
    _report(lookups.tokens, token, inside)
    return s


@triton.jit
def _dropped(x, n, d, D, dropout):
    """``dropout``: (seed, limit or None, 1 / (1 - p)). What is dropped and not finite is NaN."""
    seed, limit, keep = dropout
    if limit is not None:
        bits = _random.random_bits(seed, n[:, None] * D + d[None, :], 0)
        x *= (bits.to(tl.int64) >= limit).to(x.dtype) * tl.full((), keep, x.dtype)
    return x


@triton.jit
def _affine(x, weight_ptr, bias_ptr, d, D):
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def _inverse_root(squares, eps, D):
    """1 / deviation of rows from the sum of their squares."""
    return 1.0 / tl.sqrt(squares / D + tl.full((), eps, squares.dtype))


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_forward_kernel(
    tensors, lookups, N, D, P, K, scale: tl.float64, eps: tl.float64, seed: tl.int64, limit, keep: tl.float64, S
):
    """ROWS rows by BLOCK_D columns; with a norm these are all."""
    D = D // S.UNIT * S.UNIT
    n = tl.program_id(0).to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
    d = tl.program_id(1) * S.BLOCK_D + tl.arange(0, S.BLOCK_D)
    inside, mask = n < N, (n < N)[:, None] & (d < D)[None, :]
    s = _sum(lookups, P, K, scale, n, inside, d, D, S)
    if S.NORM == "layer":
        mean = tl.sum(s, 1) / D
        s = tl.where(mask, s - mean[:, None], 0.0)
        tl.store(tensors.stats + n * 2, mean, mask=inside)
    if S.NORM == "rms":
        tl.store(tensors.stats + n * 2, tl.zeros((S.ROWS,), S.ACC), mask=inside)
    if S.NORM != "none":
        rstd = _inverse_root(tl.sum(s * s, 1), eps, D)
        tl.store(tensors.stats + n * 2 + 1, rstd, mask=inside)
        s = _affine(s * rstd[:, None], tensors.norm_weight, tensors.norm_bias, d, D)
    y = _dropped(s, n, d, D, (seed, limit, keep))
    tl.store(tensors.out + n[:, None] * D + d[None, :], y.to(tensors.out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_long_forward_kernel(
    tensors, lookups, N, D, P, K, scale: tl.float64, eps: tl.float64, seed: tl.int64, limit, keep: tl.float64, S
):
    """The same with a norm, for rows that are longer than BLOCK_D."""
    D = D // S.UNIT * S.UNIT
    n = tl.program_id(0).to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
    inside, mean = n < N, tl.zeros((S.ROWS,), S.ACC)
    if S.NORM == "layer":
        total = tl.zeros((S.ROWS, S.BLOCK_D), S.ACC)
        for begin in range(0, D, S.BLOCK_D):
            total += _sum(lookups, P, K, scale, n, inside, begin + tl.arange(0, S.BLOCK_D), D, S)
        mean = tl.sum(total, 1) / D
    squares = tl.zeros((S.ROWS, S.BLOCK_D), S.ACC)
    for begin in range(0, D, S.BLOCK_D):
        d = begin + tl.arange(0, S.BLOCK_D)
        s = _sum(lookups, P, K, scale, n, inside, d, D, S) - mean[:, None]
        squares += tl.where((d < D)[None, :], s * s, 0.0)
    rstd = _inverse_root(tl.sum(squares, 1), eps, D)
    tl.store(tensors.stats + n * 2, mean, mask=inside)
    tl.store(tensors.stats + n * 2 + 1, rstd, mask=inside)
    for begin in range(0, D, S.BLOCK_D):
        d = begin + tl.arange(0, S.BLOCK_D)
        s = _sum(lookups, P, K, scale, n, inside, d, D, S) - mean[:, None]
        y = _affine(s * rstd[:, None], tensors.norm_weight, tensors.norm_bias, d, D)
        y = _dropped(y, n, d, D, (seed, limit, keep)).to(tensors.out.dtype.element_ty)
        tl.store(tensors.out + n[:, None] * D + d[None, :], y, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _normal_and_dy(lookups, P, K, scale, dropout, tensors, mean, rstd, n, inside, d, D, S):
    """The normalised rows and the gradients at what the norm gave; zeros outside."""
    mask = inside[:, None] & (d < D)[None, :]
    dy = tl.load(tensors.dout + n[:, None] * D + d[None, :], mask=mask, other=0.0).to(S.ACC)
    s = _sum(lookups, P, K, scale, n, inside, d, D, S)
    x = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
    return x, _dropped(dy, n, d, D, dropout)


# With x the normalised row and g the gradient at it: dsum = (g - mean(g) - x mean(g x)) / deviation; without the mean
# of g for rms.
@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_backward_kernel(
    tensors, lookups, N, D, P, K, partition_tokens, scale: tl.float64, seed: tl.int64, limit, keep: tl.float64, S
):
    """A partition of the tokens: the gradients at their sums, if BLOCK_D is all columns, and a partial sum of the
    gradients of the norm's weight and bias."""
    D = D // S.UNIT * S.UNIT
    dropout = seed, limit, keep
    partition = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * S.BLOCK_D + tl.arange(0, S.BLOCK_D)
    dweight, dbias = tl.zeros((S.ROWS, S.BLOCK_D), S.ACC), tl.zeros((S.ROWS, S.BLOCK_D), S.ACC)
    end = tl.minimum((partition + 1) * partition_tokens, N)
    for first in range(partition * partition_tokens, end, S.ROWS):
        n = first + tl.arange(0, S.ROWS)
        inside = n < end
        mean = tl.load(tensors.stats + n * 2, mask=inside, other=0.0)
        rstd = tl.load(tensors.stats + n * 2 + 1, mask=inside, other=0.0)
        x, dy = _normal_and_dy(lookups, P, K, scale, dropout, tensors, mean, rstd, n, inside, d, D, S)
        if tensors.dweight is not None:
            dweight += dy * x
        if tensors.dbias is not None:
            dbias += dy
        if tensors.dsum is not None:
            g = _affine(dy, tensors.norm_weight, None, d, D)
            slope = tl.sum(g * x, 1) / D
            if S.NORM == "layer":
                g -= (tl.sum(g, 1) / D)[:, None]
            dsum = ((g - x * slope[:, None]) * rstd[:, None]).to(tensors.dsum.dtype.element_ty)
            tl.store(tensors.dsum + n[:, None] * D + d[None, :], dsum, mask=inside[:, None] & (d < D)[None, :])
    if tensors.dweight is not None:
        tl.store(tensors.dweight + partition * D + d, tl.sum(dweight, 0), mask=d < D)
    if tensors.dbias is not None:
        tl.store(tensors.dbias + partition * D + d, tl.sum(dbias, 0), mask=d < D)


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_long_backward_kernel(
    tensors, lookups, N, D, P, K, scale: tl.float64, seed: tl.int64, limit, keep: tl.float64, S
):
    """The gradients at the sums of rows that are longer than BLOCK_D."""
    D = D // S.UNIT * S.UNIT
    dropout = seed, limit, keep
    n = tl.program_id(0).to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
    inside = n < N
    mean = tl.load(tensors.stats + n * 2, mask=inside, other=0.0)
    rstd = tl.load(tensors.stats + n * 2 + 1, mask=inside, other=0.0)
    total, product = tl.zeros((S.ROWS, S.BLOCK_D), S.ACC), tl.zeros((S.ROWS, S.BLOCK_D), S.ACC)
    for begin in range(0, D, S.BLOCK_D):
        d = begin + tl.arange(0, S.BLOCK_D)
        x, dy = _normal_and_dy(lookups, P, K, scale, dropout, tensors, mean, rstd, n, inside, d, D, S)
        g = _affine(dy, tensors.norm_weight, None, d, D)
        total, product = total + g, product + g * x
    slope, shift = tl.sum(product, 1) / D, tl.zeros((S.ROWS,), S.ACC)
    if S.NORM == "layer":
        shift = tl.sum(total, 1) / D
    for begin in range(0, D, S.BLOCK_D):
        d = begin + tl.arange(0, S.BLOCK_D)
        x, dy = _normal_and_dy(lookups, P, K, scale, dropout, tensors, mean, rstd, n, inside, d, D, S)
        g = _affine(dy, tensors.norm_weight, None, d, D) - shift[:, None] - x * slope[:, None]
        dsum = (g * rstd[:, None]).to(tensors.dsum.dtype.element_ty)
        tl.store(tensors.dsum + n[:, None] * D + d[None, :], dsum, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_partitions_kernel(
    partials_ptr, out_ptr, partitions, D, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The sum of the partial sums (partitions, D), in order."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for first in range(0, partitions, ROWS):
        partition = first + tl.arange(0, ROWS)
        mask = (partition < partitions)[:, None] & (d < D)[None, :]
        total += tl.load(partials_ptr + partition[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)
