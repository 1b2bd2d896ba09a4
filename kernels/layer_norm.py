"""Layer normalisation: y = (x - mean) / sqrt(variance + eps) * weight + bias; with rms the mean counts for 0.

Traffic. Forward: reads x, writes y and two numbers a row. Backward: reads x and dy, writes dx. A program keeps whole
rows in registers from the first read to the last write; past D = 4096 a row is read again instead, from L1 or L2.

Gradients of weight and bias are sums over chunks of rows, each in the registers of one program, added in order by a
second kernel: how many chunks there are depends on N alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import unit_d
from ._launch import acc_type, accumulator, ceil_div, launch, next_power_of_2, require_rows

# The longest row that is kept in registers.
LONGEST = 4096
# Chunks of rows for the gradients of weight and bias: as many as this, of at least so many rows.
CHUNKS, CHUNK_ROWS = 512, 16
_CHANGING = ["N", "rows", "chunks"]


@triton.jit
def _load(ptr, n, d, D, mask, ACC: tl.constexpr):
    """(ROWS, BLOCK_D) of rows n and columns d, zeros outside."""
    return tl.load(ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _scaled(x, weight_ptr, d, D):
    return x if weight_ptr is None else x * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(x.dtype)[None, :]


@triton.jit
def _store_rows(ptr, x, n, d, D, mask):
    tl.store(ptr + n[:, None] * D + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_result(y_ptr, x, weight_ptr, bias_ptr, n, d, D, mask):
    y = _scaled(x, weight_ptr, d, D)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(y.dtype)[None, :]
    _store_rows(y_ptr, y, n, d, D, mask)


@triton.jit
def _store_stats(stats_ptr, mean, squares, eps, n, inside, D):
    """Returns 1 / deviation."""
    rstd = 1.0 / tl.sqrt(squares / D + tl.full((), eps, squares.dtype))
    tl.store(stats_ptr + n * 2, mean, mask=inside)
    tl.store(stats_ptr + n * 2 + 1, rstd, mask=inside)
    return rstd


@triton.jit
def _load_stats(stats_ptr, n, inside):
    mean = tl.load(stats_ptr + n * 2, mask=inside, other=0.0)
    return mean, tl.load(stats_ptr + n * 2 + 1, mask=inside, other=0.0)


@triton.jit(do_not_specialize=_CHANGING)
def layer_norm_forward_kernel(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, N, D, eps: tl.float64,
    RMS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of at most BLOCK_D columns."""
    D = D // UNIT * UNIT
    n, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside, mask = n < N, (n < N)[:, None] & (d < D)[None, :]
    x, mean = _load(x_ptr, n, d, D, mask, ACC), tl.zeros((ROWS,), ACC)
    if not RMS:
        mean = tl.sum(x, 1) / D
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = _store_stats(stats_ptr, mean, tl.sum(x * x, 1), eps, n, inside, D)
    _store_result(y_ptr, x * rstd[:, None], weight_ptr, bias_ptr, n, d, D, mask)


@triton.jit(do_not_specialize=_CHANGING)
def layer_norm_long_forward_kernel(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, N, D, eps: tl.float64,
    RMS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same for rows that are longer than BLOCK_D."""
    D = D // UNIT * UNIT
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, mean = n < N, tl.zeros((ROWS,), ACC)
    if not RMS:
        total = tl.zeros((ROWS, BLOCK_D), ACC)
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            total += _load(x_ptr, n, d, D, inside[:, None] & (d < D)[None, :], ACC)
        mean = tl.sum(total, 1) / D
    squares = tl.zeros((ROWS, BLOCK_D), ACC)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.where(mask, _load(x_ptr, n, d, D, mask, ACC) - mean[:, None], 0.0)
        squares += x * x
    rstd = _store_stats(stats_ptr, mean, tl.sum(squares, 1), eps, n, inside, D)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        x = (_load(x_ptr, n, d, D, mask, ACC) - mean[:, None]) * rstd[:, None]
        _store_result(y_ptr, x, weight_ptr, bias_ptr, n, d, D, mask)


@triton.jit
def _normal_and_dy(x_ptr, dy_ptr, mean, rstd, n, d, D, mask, ACC: tl.constexpr):
    """The normalised rows and the gradients at what the norm gave; zeros outside."""
    x = (_load(x_ptr, n, d, D, mask, ACC) - mean[:, None]) * rstd[:, None]
    return tl.where(mask, x, 0.0), _load(dy_ptr, n, d, D, mask, ACC)


# With x the normalised row and g = dy * weight: dx = (g - mean(g) - x mean(g x)) / deviation; rms has no mean(g).
@triton.jit(do_not_specialize=_CHANGING)
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, N, D, rows,
    RMS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A chunk of rows: dx, if BLOCK_D is all columns, and the chunk's part of the gradients of weight and bias."""
    D = D // UNIT * UNIT
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight, dbias = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((ROWS, BLOCK_D), ACC)
    end = tl.minimum((chunk + 1) * rows, N)
    for first in range(chunk * rows, end, ROWS):
        n = first + tl.arange(0, ROWS)
        mask = (n < end)[:, None] & (d < D)[None, :]
        mean, rstd = _load_stats(stats_ptr, n, n < end)
        x, dy = _normal_and_dy(x_ptr, dy_ptr, mean, rstd, n, d, D, mask, ACC)
        if dweight_ptr is not None:
            dweight += dy * x
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = _scaled(dy, weight_ptr, d, D)
            slope = tl.sum(g * x, 1) / D
            if not RMS:
                g -= (tl.sum(g, 1) / D)[:, None]
            _store_rows(dx_ptr, (g - x * slope[:, None]) * rstd[:, None], n, d, D, mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + chunk * D + d, tl.sum(dweight, 0), mask=d < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + chunk * D + d, tl.sum(dbias, 0), mask=d < D)


@triton.jit(do_not_specialize=_CHANGING)
def layer_norm_long_backward_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, dx_ptr, N, D,
    RMS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dx of rows that are longer than BLOCK_D."""
    D = D // UNIT * UNIT
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    mean, rstd = _load_stats(stats_ptr, n, inside)
    shift, slope = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((ROWS, BLOCK_D), ACC)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x, dy = _normal_and_dy(x_ptr, dy_ptr, mean, rstd, n, d, D, inside[:, None] & (d < D)[None, :], ACC)
        g = _scaled(dy, weight_ptr, d, D)
        slope += g * x
        if not RMS:
            shift += g
    slopes, shifts = tl.sum(slope, 1) / D, tl.sum(shift, 1) / D
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        x, dy = _normal_and_dy(x_ptr, dy_ptr, mean, rstd, n, d, D, mask, ACC)
        dx = _scaled(dy, weight_ptr, d, D) - shifts[:, None] - x * slopes[:, None]
        _store_rows(dx_ptr, dx * rstd[:, None], n, d, D, mask)


@triton.jit(do_not_specialize=_CHANGING)
def layer_norm_chunks_kernel(
    parts_ptr, out_ptr, chunks, D, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The sum of the chunks' parts (chunks, D), in order."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        total += _load(parts_ptr, chunk, d, D, (chunk < chunks)[:, None] & (d < D)[None, :], ACC)
    tl.store(out_ptr + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)


def _tile(D: int, elements: int) -> dict[str, Any]:
    """Several short rows, or one, by one program: so many elements of a thread, whose registers limit them."""
    BLOCK_D, threads = min(max(next_power_of_2(D), 16), LONGEST), 128
    rows = min(max(threads * elements // BLOCK_D, 1), 32)
    return {"ROWS": rows, "BLOCK_D": BLOCK_D, "UNIT": unit_d(D), "num_warps": max(BLOCK_D // elements, threads) // 32}


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    require_rows("layer_norm", x, "x")
    for name, row in (("weight", weight), ("bias", bias)):
        if row is not None and (row.shape != x.shape[1:] or not row.is_contiguous()):
            raise ValueError(f"layer_norm: expected a contiguous {name} (D)")


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """(y, stats): (N, D), and each row's mean (0 with rms) and 1 / deviation, (N, 2)."""
    _check(x, weight, bias)
    N, D = x.shape
    y, stats = torch.empty_like(x), x.new_empty((N, 2), dtype=accumulator(x))
    kernel = layer_norm_long_forward_kernel if D > LONGEST else layer_norm_forward_kernel
    tile = _tile(D, 16)
    grid = (ceil_div(N, tile["ROWS"]),)
    launch(kernel, grid, x, y, stats, weight, bias, N, D, eps, RMS=rms, ACC=acc_type(x), **tile)
    return y, stats


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    wants: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); the k-th is empty unless bit k of ``wants`` is set."""
    _check(x, weight, bias)
    if dy.shape != x.shape or dy.dtype != x.dtype or not dy.is_contiguous() or not stats.is_contiguous():
        raise ValueError(
            "layer_norm: expected a contiguous dy of x's shape and dtype, and stats as the forward gave it"
        )
    N, D = x.shape
    tile, constants = _tile(D, 8), {"RMS": rms, "ACC": acc_type(x)}
    dx = torch.empty_like(x) if wants & 1 else x.new_empty(0)
    vectors = [t if t is not None and wants >> k & 1 else None for k, t in ((1, weight), (2, bias))]
    learns, long = any(t is not None for t in vectors), D > LONGEST
    rows = max(CHUNK_ROWS, ceil_div(N, CHUNKS)) if learns else tile["ROWS"]
    chunks = ceil_div(N, rows)
    parts = [None if t is None else x.new_empty((chunks, D), dtype=accumulator(x)) for t in vectors]
    if long and wants & 1:
        grid: tuple[int, ...] = (ceil_div(N, tile["ROWS"]),)
        launch(layer_norm_long_backward_kernel, grid, dy, x, stats, weight, dx, N, D, **constants, **tile)
    if learns or (wants & 1 and not long):
        grid, to_x = (chunks, ceil_div(D, tile["BLOCK_D"])), dx if wants & 1 and not long else None
        arguments = (dy, x, stats, weight, to_x, *parts, N, D, rows)
        launch(layer_norm_backward_kernel, grid, *arguments, **constants, **tile)
    results = []
    for t, part in zip(vectors, parts, strict=True):
        results.append(x.new_empty(0) if t is None else torch.empty_like(t))
        if part is not None:
            launch(
                layer_norm_chunks_kernel, (ceil_div(D, 32),), part, results[-1], chunks, D,
                ACC=acc_type(x), ROWS=128, BLOCK_D=32, num_warps=8,
            )  # fmt: skip
    return dx, results[0], results[1]
