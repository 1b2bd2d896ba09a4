"""A linear layer: cuBLAS's products, through torch.

Nothing beside a product is left to fuse, so `auto` calls torch's own function. This is for whoever forces the backend
on a whole model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (N, O) = x (N, I) weight^T + bias."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """dx = dy weight and dweight = dy^T x; what is not needed is empty."""
    nothing = x.new_empty(0)
    return torch.mm(dy, weight) if need_x else nothing, torch.mm(dy.t(), x) if need_weight else nothing
