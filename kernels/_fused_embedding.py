"""Kernels of the fused embedding; kernels/fused_embedding.py has the idea, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _faults, _random

# What may change between calls.
_CHANGING = ["N", "position_period", "type_period", "seed", "limit", "share_tokens", "shares"]


@triton.jit
def _index(table, n, inside):
    """The rows of the tokens ``n``. ``table``: (table, indices, fault, number of rows, after how many tokens the
    indices repeat or None)."""
    at = n if table[4] is None else n % table[4]
    return tl.load(table[1] + at, mask=inside, other=0).to(tl.int64)


@triton.jit
def _rows(table, index, inside, d, D, ACC: tl.constexpr):
    """(ROWS, BLOCK_D), zeros outside the table and its columns."""
    mask = (inside & (index >= 0) & (index < table[3]))[:, None] & (d < D)[None, :]
    return tl.load(table[0] + index[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _report(table, index, inside):
    _faults.report(inside & ((index < 0) | (index >= table[3])), index, table[2])


@triton.jit
def _sum(tokens, positions, types, scale, n, inside, d, D, ACC: tl.constexpr):
    """scale * token + position + type. Loads keep their order in a program: first all indices, then all rows, so that
    as many as possible are in flight."""
    token = _index(tokens, n, inside)
    position = token if positions[0] is None else _index(positions, n, inside)
    type_ = token if types[0] is None else _index(types, n, inside)
    s = _rows(tokens, token, inside, d, D, ACC) * tl.full((), scale, ACC)
    if positions[0] is not None:
        s += _rows(positions, position, inside, d, D, ACC)
    if types[0] is not None:
        s += _rows(types, type_, inside, d, D, ACC)
        _report(types, type_, inside)
    if positions[0] is not None:
        _report(positions, position, inside)
    _report(tokens, token, inside)
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
def _affine(x, norm_weight_ptr, norm_bias_ptr, d, D):
    if norm_weight_ptr is not None:
        x *= tl.load(norm_weight_ptr + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    if norm_bias_ptr is not None:
        x += tl.load(norm_bias_ptr + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def _inverse_root(squares, eps, D):
    """1 / deviation of rows from the sum of their squares."""
    return 1.0 / tl.sqrt(squares / D + tl.full((), eps, squares.dtype))


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_forward_kernel(
    out_ptr, stats_ptr, weight_ptr, position_weight_ptr, type_weight_ptr, norm_weight_ptr, norm_bias_ptr,
    indices_ptr, positions_ptr, types_ptr, token_fault_ptr, position_fault_ptr, type_fault_ptr,
    N, D, V, P, K, position_period, type_period,
    scale: tl.float64, eps: tl.float64, seed: tl.int64, limit, keep: tl.float64,
    NORM: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """ROWS rows by BLOCK_D columns; with a norm these are all."""
    D = D // UNIT * UNIT
    tokens = (weight_ptr, indices_ptr, token_fault_ptr, V, None)
    positions = (position_weight_ptr, positions_ptr, position_fault_ptr, P, position_period)
    types = (type_weight_ptr, types_ptr, type_fault_ptr, K, type_period)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, mask = n < N, (n < N)[:, None] & (d < D)[None, :]
    s = _sum(tokens, positions, types, scale, n, inside, d, D, ACC)
    if NORM == "layer":
        mean = tl.sum(s, 1) / D
        s = tl.where(mask, s - mean[:, None], 0.0)
        tl.store(stats_ptr + n * 2, mean, mask=inside)
    if NORM == "rms":
        tl.store(stats_ptr + n * 2, tl.zeros((ROWS,), ACC), mask=inside)
    if NORM != "none":
        rstd = _inverse_root(tl.sum(s * s, 1), eps, D)
        tl.store(stats_ptr + n * 2 + 1, rstd, mask=inside)
        s = _affine(s * rstd[:, None], norm_weight_ptr, norm_bias_ptr, d, D)
    y = _dropped(s, n, d, D, (seed, limit, keep))
    tl.store(out_ptr + n[:, None] * D + d[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_long_forward_kernel(
    out_ptr, stats_ptr, weight_ptr, position_weight_ptr, type_weight_ptr, norm_weight_ptr, norm_bias_ptr,
    indices_ptr, positions_ptr, types_ptr, token_fault_ptr, position_fault_ptr, type_fault_ptr,
    N, D, V, P, K, position_period, type_period,
    scale: tl.float64, eps: tl.float64, seed: tl.int64, limit, keep: tl.float64,
    NORM: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same with a norm, for rows that are longer than BLOCK_D."""
    D = D // UNIT * UNIT
    tokens = (weight_ptr, indices_ptr, token_fault_ptr, V, None)
    positions = (position_weight_ptr, positions_ptr, position_fault_ptr, P, position_period)
    types = (type_weight_ptr, types_ptr, type_fault_ptr, K, type_period)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, mean = n < N, tl.zeros((ROWS,), ACC)
    if NORM == "layer":
        total = tl.zeros((ROWS, BLOCK_D), ACC)
        for begin in range(0, D, BLOCK_D):
            total += _sum(tokens, positions, types, scale, n, inside, begin + tl.arange(0, BLOCK_D), D, ACC)
        mean = tl.sum(total, 1) / D
    squares = tl.zeros((ROWS, BLOCK_D), ACC)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        s = _sum(tokens, positions, types, scale, n, inside, d, D, ACC) - mean[:, None]
        squares += tl.where((d < D)[None, :], s * s, 0.0)
    rstd = _inverse_root(tl.sum(squares, 1), eps, D)
    tl.store(stats_ptr + n * 2, mean, mask=inside)
    tl.store(stats_ptr + n * 2 + 1, rstd, mask=inside)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        s = _sum(tokens, positions, types, scale, n, inside, d, D, ACC) - mean[:, None]
        y = _affine(s * rstd[:, None], norm_weight_ptr, norm_bias_ptr, d, D)
        y = _dropped(y, n, d, D, (seed, limit, keep)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + n[:, None] * D + d[None, :], y, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _normal_and_dy(tokens, positions, types, scale, dropout, dout_ptr, mean, rstd, n, inside, d, D, ACC: tl.constexpr):
    """The normalised rows and the gradients at what the norm gave; zeros outside."""
    mask = inside[:, None] & (d < D)[None, :]
    dy = tl.load(dout_ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
    s = _sum(tokens, positions, types, scale, n, inside, d, D, ACC)
    x = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
    return x, _dropped(dy, n, d, D, dropout)


# With x the normalised row and g the gradient at it: dsum = (g - mean(g) - x mean(g x)) / deviation; without the mean
# of g for rms.
@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_backward_kernel(
    dout_ptr, stats_ptr, dsum_ptr, dweight_ptr, dbias_ptr, weight_ptr, position_weight_ptr, type_weight_ptr,
    norm_weight_ptr, indices_ptr, positions_ptr, types_ptr, token_fault_ptr, position_fault_ptr, type_fault_ptr,
    N, D, V, P, K, position_period, type_period, share_tokens,
    scale: tl.float64, seed: tl.int64, limit, keep: tl.float64,
    NORM: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A share of the tokens: the gradients at their sums, if BLOCK_D is all columns, and a partial sum of the gradients
    of the norm's weight and bias."""
    D = D // UNIT * UNIT
    tokens = (weight_ptr, indices_ptr, token_fault_ptr, V, None)
    positions = (position_weight_ptr, positions_ptr, position_fault_ptr, P, position_period)
    types = (type_weight_ptr, types_ptr, type_fault_ptr, K, type_period)
    share = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight, dbias = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((ROWS, BLOCK_D), ACC)
    end = tl.minimum((share + 1) * share_tokens, N)
    for first in range(share * share_tokens, end, ROWS):
        n = first + tl.arange(0, ROWS)
        inside = n < end
        mean = tl.load(stats_ptr + n * 2, mask=inside, other=0.0)
        rstd = tl.load(stats_ptr + n * 2 + 1, mask=inside, other=0.0)
        x, dy = _normal_and_dy(
            tokens, positions, types, scale, (seed, limit, keep), dout_ptr, mean, rstd, n, inside, d, D,
            ACC,
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += dy * x
        if dbias_ptr is not None:
            dbias += dy
        if dsum_ptr is not None:
            g = _affine(dy, norm_weight_ptr, None, d, D)
            slope = tl.sum(g * x, 1) / D
            if NORM == "layer":
                g -= (tl.sum(g, 1) / D)[:, None]
            dsum = ((g - x * slope[:, None]) * rstd[:, None]).to(dsum_ptr.dtype.element_ty)
            tl.store(dsum_ptr + n[:, None] * D + d[None, :], dsum, mask=inside[:, None] & (d < D)[None, :])
    if dweight_ptr is not None:
        tl.store(dweight_ptr + share * D + d, tl.sum(dweight, 0), mask=d < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + share * D + d, tl.sum(dbias, 0), mask=d < D)


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_long_backward_kernel(
    dout_ptr, stats_ptr, dsum_ptr, weight_ptr, position_weight_ptr, type_weight_ptr,
    norm_weight_ptr, indices_ptr, positions_ptr, types_ptr, token_fault_ptr, position_fault_ptr, type_fault_ptr,
    N, D, V, P, K, position_period, type_period,
    scale: tl.float64, seed: tl.int64, limit, keep: tl.float64,
    NORM: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The gradients at the sums of rows that are longer than BLOCK_D."""
    D = D // UNIT * UNIT
    tokens = (weight_ptr, indices_ptr, token_fault_ptr, V, None)
    positions = (position_weight_ptr, positions_ptr, position_fault_ptr, P, position_period)
    types = (type_weight_ptr, types_ptr, type_fault_ptr, K, type_period)
    dropout = (seed, limit, keep)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    mean = tl.load(stats_ptr + n * 2, mask=inside, other=0.0)
    rstd = tl.load(stats_ptr + n * 2 + 1, mask=inside, other=0.0)
    total, product = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((ROWS, BLOCK_D), ACC)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x, dy = _normal_and_dy(
            tokens, positions, types, scale, dropout, dout_ptr, mean, rstd, n, inside, d, D, ACC
        )  # fmt: skip
        g = _affine(dy, norm_weight_ptr, None, d, D)
        total, product = total + g, product + g * x
    slope, shift = tl.sum(product, 1) / D, tl.zeros((ROWS,), ACC)
    if NORM == "layer":
        shift = tl.sum(total, 1) / D
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x, dy = _normal_and_dy(
            tokens, positions, types, scale, dropout, dout_ptr, mean, rstd, n, inside, d, D, ACC
        )  # fmt: skip
        g = _affine(dy, norm_weight_ptr, None, d, D) - shift[:, None] - x * slope[:, None]
        dsum = (g * rstd[:, None]).to(dsum_ptr.dtype.element_ty)
        tl.store(dsum_ptr + n[:, None] * D + d[None, :], dsum, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def fused_embedding_shares_kernel(
    partials_ptr, out_ptr, shares, D, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The sum of the shares' partial sums (shares, D), in order."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for first in range(0, shares, ROWS):
        share = first + tl.arange(0, ROWS)
        mask = (share < shares)[:, None] & (d < D)[None, :]
        total += tl.load(partials_ptr + share[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)
