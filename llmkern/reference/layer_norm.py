"""Layer normalisation (Ba, Kiros and Hinton, 2016) and its root-mean-square form (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from torch import Tensor

from .._facts import accumulate_dtype


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias``: (N, D), of x's dtype, rounded once.

    With ``rms`` the mean counts for zero: ``x / sqrt(mean of squares + eps)``. The variance is that of the D numbers
    (no correction); ``weight`` and ``bias`` (D) may have another dtype than ``x`` (N, D).
    """
    wide = accumulate_dtype(x.dtype)
    y = x.to(wide)
    if not rms:
        y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)
