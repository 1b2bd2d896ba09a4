"""Embedding lookup: ``out[n] = weight[indices[n]]``, and sums, means and maxes over bags of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_row_scale(
    indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool, like: Tensor
) -> Tensor:
    """What each looked-up row's gradient is multiplied by: (N, 1).

    0 at padding, 1/count with scale_grad_by_freq.
    """
    scale = torch.ones(indices.shape, dtype=like.dtype, device=like.device)
    if scale_grad_by_freq:
        # Counted in fp32: bfloat16 has no 257.
        counts = torch.zeros(num_weights, dtype=torch.float32, device=like.device)
        counts = counts.index_add(0, indices, scale.float())
        scale = (1 / counts[indices]).to(like.dtype)
    if padding_idx >= 0:
        scale = scale.masked_fill(indices == padding_idx, 0)
    return scale.unsqueeze(-1)


def _rows(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """The rows in fp32 or fp64, so that their gradients are added up in it."""
    rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).index_select(0, indices)
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
    return _rows(weight, indices, padding_idx, scale_grad_by_freq).to(weight.dtype)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """The ``"sum"``, ``"mean"`` or ``"max"`` of the rows of each bag: (B, D).

    Bag b holds ``indices[offsets[b] : offsets[b + 1]]``. ``weight`` (V, D), ``indices`` (N), ``offsets``
    non-decreasing from 0: (B), the last bag ending with ``indices``, or with ``include_last_offset`` (B + 1).
    ``per_sample_weights`` (N) scales rows. Padding counts as absent; a bag without rows gives zeros. A max
    goes, with its gradient, to the first of equal rows.

    Raises:
        IndexError: if an index is outside [0, V).
    """
    N, B = indices.shape[0], offsets.shape[0] - include_last_offset
    position = torch.arange(N, device=indices.device)
    bag = torch.bucketize(position, offsets[:B].long(), right=True) - 1
    absent = bag < 0
    if include_last_offset:
        absent = absent | (position >= offsets[-1])
    if padding_idx >= 0:
        absent = absent | (indices == padding_idx)
    # Absent rows go to a bag of their own behind the others.
    bag = bag.masked_fill(absent, B)
    rows = _rows(weight, indices, padding_idx, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.to(rows.dtype).unsqueeze(-1)
    if mode == "max":
        return _bag_max(rows, bag, B).to(weight.dtype)
    total = rows.new_zeros(B + 1, weight.shape[1]).index_add(0, bag, rows)
    if mode == "mean":
        count = rows.new_zeros(B + 1).index_add(0, bag, rows.new_ones(N))
        total = total / count.clamp(min=1).unsqueeze(-1)
    return total[:B].to(weight.dtype)


def _bag_max(rows: Tensor, bag: Tensor, B: int) -> Tensor:
    N, D = rows.shape
    to = bag.unsqueeze(-1).expand(N, D)
    largest = rows.detach().new_full((B + 1, D), float("-inf"))
    largest = largest.scatter_reduce(0, to, rows.detach(), "amax").gather(0, to)
    is_largest = (rows == largest) | (rows.isnan() & largest.isnan())
    position = torch.arange(N, device=rows.device).unsqueeze(-1)
    first = position.new_full((B + 1, D), N)
    first = first.scatter_reduce(0, to, torch.where(is_largest, position, N), "amin")
    return torch.cat([rows, rows.new_zeros(1, D)]).gather(0, first[:B])
