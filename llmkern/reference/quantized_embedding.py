"""Tables of 8 or 4 bits an element, with one scale and offset a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(data, scale, offset) of ``weight`` (V, D): element d of a row stands for ``q * scale + offset``.

    ``offset`` (V), float32, is the row's minimum and ``scale`` (V), float32, its range over 2^bits - 1, rounded up, so
    that no element is further than ``scale / 2`` from its nearest level. NaN where the range is no finite float32
    number. ``data``, uint8, is q for 8 bits; for 4 it is (V, ceil(D / 2)): element j in the low and element
    j + ceil(D / 2) in the high half of byte j.
    """
    V, D = weight.shape
    levels = (1 << bits) - 1
    x = weight.double()
    low, high = (x.amin(1), x.amax(1)) if D > 0 else (x.new_zeros(V), x.new_zeros(V))
    offset = low.float()
    span = (high - offset).clamp(min=0)
    exact = span / levels
    scale = exact.float()
    scale = torch.where(scale < exact, scale.nextafter(scale.new_tensor(torch.inf)), scale)
    good = span <= torch.finfo(torch.float32).max
    scale, offset = (t.masked_fill(~good, torch.nan) for t in (scale, offset))
    steps = torch.where(scale > 0, scale, torch.inf).double()
    q = ((x - offset[:, None]) / steps[:, None] + 0.5).nan_to_num(0).clamp(0, levels).to(torch.uint8)
    if bits == 4:
        half = (D + 1) // 2
        q = torch.nn.functional.pad(q, (0, 2 * half - D))
        q = q[:, :half] | q[:, half:] << 4
    return q, scale, offset


def quantized_embedding(
    weight: Tensor, scale: Tensor, offset: Tensor, indices: Tensor, embedding_dim: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """Rows at ``indices`` (N) of the table that :func:`quantize_rows` made: (N, D), computed in float32, or float64.

    Raises:
        IndexError: if an index is outside [0, V).
    """
    wide = accumulate_dtype(dtype)
    q = weight.index_select(0, indices)
    if bits == 4:
        q = torch.cat([q & 15, q >> 4], 1)[:, :embedding_dim]
    factor, shift = (t.index_select(0, indices).unsqueeze(1).to(wide) for t in (scale, offset))
    return (q.to(wide) * factor + shift).to(dtype)
