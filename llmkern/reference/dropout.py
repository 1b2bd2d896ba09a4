"""Dropout with a mask that is computed from a seed wherever it is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from ._random import drawn


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x / (1 - p)`` where an element is kept, else 0; it is dropped with probability ``p``, by ``seed`` and index.

    Hinton et al., 2012; inverted, so that evaluation needs no scale. ``p`` = 1 drops all. As in torch what is dropped
    and not finite is NaN.
    """
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    wide = accumulate_dtype(x.dtype)
    scale = drawn(p, seed, index, 0).logical_not().to(wide) * (1 / (1 - p) if p < 1 else 0.0)
    return (x.to(wide) * scale).to(x.dtype)
