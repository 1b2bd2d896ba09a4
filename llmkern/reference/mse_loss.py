"""Squared error: ``(input - target)^2``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype


def mse_loss(input: Tensor, target: Tensor, reduce: bool, weight: Tensor | None = None) -> Tensor:
    """``weight * (input - target)^2``, all of one shape.

    With ``reduce`` the sum: (), float32, or float64 if an argument is; else each, of the arguments' dtype.
    """
    tensors = (input, target) if weight is None else (input, target, weight)
    dtype = input.dtype
    for other in tensors[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    accumulate = accumulate_dtype(dtype)
    difference = input.to(accumulate) - target.to(accumulate)
    square = difference * difference
    if weight is not None:
        square = square * weight.to(accumulate)
    return square.sum() if reduce else square.to(dtype)
