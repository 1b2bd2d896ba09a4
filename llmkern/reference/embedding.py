"""Embedding lookup: ``out[n] = weight[indices[n]]``."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_row_scale(
    indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool, like: Tensor
) -> Tensor:
    """What each looked-up row's gradient is multiplied by: (N, 1). 0 at padding, 1/count with scale_grad_by_freq."""
    scale = torch.ones(indices.shape, dtype=like.dtype, device=like.device)
    if scale_grad_by_freq:
        counts = torch.zeros(num_weights, dtype=like.dtype, device=like.device)
        counts = counts.index_add(0, indices, scale)
        scale = 1 / counts[indices]
    if padding_idx >= 0:
        scale = scale.masked_fill(indices == padding_idx, 0)
    return scale.unsqueeze(-1)


def embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False) -> Tensor:
    """Rows of ``weight`` (V, D) at ``indices`` (N): (N, D). ``padding_idx`` < 0: none.

    Padding and frequency act on the gradient alone: the scaled part carries it, the rest is detached.

    Raises:
        IndexError: if an index is outside [0, V).
    """
    if indices.numel() and (indices.min() < 0 or indices.max() >= weight.shape[0]):
        raise IndexError("index out of range in self")
    rows = weight[indices]
    if padding_idx < 0 and not scale_grad_by_freq:
        return rows
    scale = embedding_row_scale(indices, weight.shape[0], padding_idx, scale_grad_by_freq, weight)
    scaled = rows * scale
    return rows.detach() + (scaled - scaled.detach())
