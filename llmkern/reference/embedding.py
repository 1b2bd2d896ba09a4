"""Embedding lookup: ``out[n] = weight[indices[n]]``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype


def embedding_row_scale(
    indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool, like: Tensor
) -> Tensor:
    """What each looked-up row's gradient is multiplied by: (N, 1).

    0 at padding, 1/count with scale_grad_by_freq.
    """
    scale = torch.ones(indices.shape, dtype=like.dtype, device=like.device)
    if scale_grad_by_freq:
        # Counted in fp32 or more: bfloat16 has no 257.
        wide = accumulate_dtype(like.dtype)
        counts = torch.zeros(num_weights, dtype=wide, device=like.device)
        counts = counts.index_add(0, indices, scale.to(wide))
        scale = (1 / counts[indices]).to(like.dtype)
    if padding_idx >= 0:
        scale = scale.masked_fill(indices == padding_idx, 0)
    return scale.unsqueeze(-1)


def embedding_rows(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """The rows in fp32 or fp64, so that their gradients are added up in it."""
    rows = weight.to(accumulate_dtype(weight.dtype)).index_select(0, indices)
    if scale_grad_by_freq:
        scaled = rows * embedding_row_scale(indices, weight.shape[0], -1, True, rows)
        # Infinite and NaN elements carry the scaled gradient too, but cancel to NaN in the difference.
        rows = torch.where(rows.isfinite(), rows.detach() + (scaled - scaled.detach()), scaled)
    if padding_idx >= 0:
        rows = torch.where((indices == padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows


def embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False) -> Tensor:
    """Rows of ``weight`` (V, D) at ``indices`` (N): (N, D). ``padding_idx`` < 0: none.

    Padding and frequency act on the gradient alone.

    Raises:
        IndexError: if an index is outside [0, V).
    """
    return embedding_rows(weight, indices, padding_idx, scale_grad_by_freq).to(weight.dtype)
