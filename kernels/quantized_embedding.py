"""Tables of 8 or 4 bits an element, one scale and offset a row, for inference.

Traffic of a lookup: N rows of 1 or 1/2 byte an element and 8 bytes beside, read once; N*D elements written once. The
table is a quarter or an eighth of one in fp32, so that it, or more of its frequent rows, stays in L2.

With 4 bits byte j of a row holds element j in its low and element j + ceil(D / 2) in its high half, so that a block of
bytes becomes two straight runs of elements. A thread takes 8 bytes: 16 bytes or two of them, once each, in a store.

Quantising reads the table twice (the second time from L1 or L2: row by row) and works in fp64, so that what it rounds
is the result alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _faults
from ._blocks import unit_d
from ._launch import acc_type, ceil_div, launch, next_power_of_2

BLOCK = 1024


@triton.jit(do_not_specialize=["N"])
def quantized_embedding_forward_kernel(
    weight_ptr, scale_ptr, offset_ptr, indices_ptr, out_ptr, fault_ptr, N, V, D, width,
    ACC: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Rows of the result by columns of bytes; ``width``: the bytes of a row."""
    D, width = D // UNIT * UNIT, width // UNIT * UNIT
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = n < N
    row = tl.load(indices_ptr + n, mask=inside, other=0).to(tl.int64)
    good = inside & (row >= 0) & (row < V)
    _faults.report(inside & ~good, row, fault_ptr)
    scale = tl.load(scale_ptr + row, mask=good, other=0.0).to(ACC)[:, None]
    offset = tl.load(offset_ptr + row, mask=good, other=0.0).to(ACC)[:, None]
    q = tl.load(weight_ptr + row[:, None] * width + j[None, :], mask=good[:, None] & (j < width)[None, :], other=0)
    to = out_ptr + n[:, None] * D + j[None, :]
    low = q if BITS == 8 else q & 15
    value = low.to(ACC) * scale + offset
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (j < width)[None, :])
    if BITS == 4:
        value = (q >> 4).to(ACC) * scale + offset
        tl.store(to + width, value.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (j < D - width)[None, :])


@triton.jit
def _extremes(row_ptr, D, BLOCK: tl.constexpr):
    """(smallest, largest, poison) of a row in fp64: the last is 0, or NaN if an element is NaN or infinite."""
    low, poison = tl.full((BLOCK,), float("inf"), tl.float64), tl.zeros((BLOCK,), tl.float64)
    high = -low
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float64)
        low, high = tl.minimum(low, tl.where(d < D, x, low)), tl.maximum(high, tl.where(d < D, x, high))
        poison += x - x
    return tl.where(D > 0, tl.min(low, 0), 0.0), tl.where(D > 0, tl.max(high, 0), 0.0), tl.sum(poison, 0)


@triton.jit
def _rounded_up(x):
    """The smallest fp32 number that is not below x >= 0, fp64."""
    near = x.to(tl.float32)
    above = (near.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where(near.to(tl.float64) < x, above, near)


@triton.jit
def _levels(row_ptr, d, end, first, step, LEVELS: tl.constexpr):
    """The nearest level of the elements ``d`` of a row, 0 from ``end`` on."""
    x = tl.load(row_ptr + d, mask=d < end, other=0.0).to(tl.float64)
    q = tl.where(d < end, (x - first) / step + 0.5, 0.0)
    return tl.minimum(tl.maximum(q, 0.0), LEVELS).to(tl.int32)


@triton.jit
def quantized_embedding_quantize_kernel(
    weight_ptr, data_ptr, scale_ptr, offset_ptr, D, width,
    BITS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One row."""
    D, width = D // UNIT * UNIT, width // UNIT * UNIT
    LEVELS: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * D
    low, high, poison = _extremes(row_ptr, D, BLOCK)
    offset = low.to(tl.float32)
    # A minimum of fp64 was rounded: what lies below it is as near to it as its rounding.
    first = offset.to(tl.float64)
    span = tl.maximum(high - first, 0.0)
    scale = _rounded_up(span / LEVELS)
    good = span + poison <= 3.4028234663852886e38
    tl.store(scale_ptr + row, tl.where(good, scale, float("nan")))
    tl.store(offset_ptr + row, tl.where(good, offset, float("nan")))
    # A row that has a single level, or none, has level 0 everywhere.
    step = tl.where(good & (scale > 0), scale, float("inf")).to(tl.float64)
    for begin in range(0, width, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        q = _levels(row_ptr, j, width, first, step, LEVELS)
        if BITS == 4:
            q = q | _levels(row_ptr, width + j, D, first, step, LEVELS) << 4
        tl.store(data_ptr + row * width + j, q.to(tl.uint8), mask=j < width)


def _width(D: int, bits: int) -> int:
    """Bytes of a row."""
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    return D if bits == 8 else (D + 1) // 2


def quantized_embedding_quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(data, scale, offset) of ``weight`` (V, D), contiguous: bit for bit :func:`llmkern.reference.quantize_rows`."""
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError("quantized_embedding_quantize: expected weight (V, D), contiguous")
    V, D = weight.shape
    width = _width(D, bits)
    data = weight.new_empty((V, width), dtype=torch.uint8)
    scale, offset = (weight.new_empty(V, dtype=torch.float32) for _ in range(2))
    launch(
        quantized_embedding_quantize_kernel, (V,), weight, data, scale, offset, D, width,
        BITS=bits, BLOCK=min(max(next_power_of_2(width), 16), BLOCK), UNIT=unit_d(D | width),
    )  # fmt: skip
    return data, scale, offset


def quantized_embedding_forward(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    indices: Tensor,
    embedding_dim: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows at ``indices`` (N): (N, D) of ``dtype``, computed in float32, or float64. All contiguous.

    Raises:
        IndexError: if an index is outside [0, V); see :mod:`llmkern.kernels._faults`.
    """
    D, width = embedding_dim, _width(embedding_dim, bits)
    if not all(t.is_contiguous() for t in (weight, scale, offset, indices)):
        raise ValueError("quantized_embedding: expected contiguous tensors")
    if weight.dim() != 2 or weight.dtype != torch.uint8 or weight.shape[1] != width:
        raise ValueError("weight: expected uint8 (V, D), or (V, ceil(D / 2)) for 4 bits")
    V, N = weight.shape[0], indices.shape[0]
    if any(t.shape != (V,) or t.dtype != torch.float32 for t in (scale, offset)):
        raise ValueError("scale, offset: expected float32 (V)")
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices: expected int64 or int32, got {indices.dtype}")
    out = scale.new_empty((N, D), dtype=dtype)
    BLOCK_W = min(max(next_power_of_2(width), 16), BLOCK)
    ROWS = BLOCK // BLOCK_W
    launch(
        quantized_embedding_forward_kernel, (ceil_div(N, ROWS), max(ceil_div(width, BLOCK_W), 1)), weight, scale,
        offset, indices, out, _faults.word(_faults.EMBEDDING), N, V, D, width,
        ACC=acc_type(out), BITS=bits, ROWS=ROWS, BLOCK_W=BLOCK_W, UNIT=unit_d(D | width),
    )  # fmt: skip
    return out
