"""The length of many tensors taken as one vector, and their scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype


def grad_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of the squares of all elements), a float64 scalar; summed in float64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Each tensor times ``factor``, a float64 scalar, in place: multiplied in fp32 (fp64 for fp64), rounded once."""
    for tensor in tensors:
        wide = accumulate_dtype(tensor.dtype)
        tensor.copy_(tensor.to(wide) * factor.item())
