"""A linear layer: ``x weight^T + bias``."""

from __future__ import annotations

from torch import Tensor

from .._facts import accumulate_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, O) of ``x`` (N, I), ``weight`` (O, I) and ``bias`` (O); sums in fp32 (fp64 for fp64), rounded once."""
    wide = accumulate_dtype(x.dtype)
    y = x.to(wide) @ weight.to(wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
