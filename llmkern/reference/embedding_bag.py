"""Sums, means and maxes over bags of looked-up rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .embedding import embedding_rows


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
    ``per_sample_weights`` (N) scales rows; a mean divides by their number. Padding counts as absent; a bag without
    rows gives zeros. A max goes, with its gradient, to the first of equal rows; a NaN wins only as a bag's first row.

    Raises:
        IndexError: if an index is outside [0, V).
    """
    N, B = indices.shape[0], offsets.shape[0] - int(include_last_offset)
    position = torch.arange(N, device=indices.device)
    bag = torch.bucketize(position, offsets[:B].long(), right=True) - 1
    absent = bag < 0
    if include_last_offset:
        absent = absent | (position >= offsets[-1])
    if padding_idx >= 0:
        absent = absent | (indices == padding_idx)
    # Absent rows go to a bag of their own behind the others.
    bag = bag.masked_fill(absent, B)
    rows = embedding_rows(weight, indices, padding_idx, scale_grad_by_freq)
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
    position = torch.arange(N, device=rows.device).unsqueeze(-1).expand(N, D)

    def first_in_bag(of: Tensor) -> Tensor:
        """The first position in each bag where ``of`` (N, D) holds, or N: (B + 1, D)."""
        none = position.new_full((B + 1, D), N)
        return none.scatter_reduce(0, to, torch.where(of, position, N), "amin")

    # As in torch, no element is larger than a NaN that came first, and a later NaN is larger than none.
    leads = position == first_in_bag(position >= 0).gather(0, to)
    values = rows.detach().masked_fill(rows.isnan() & ~leads, float("-inf"))
    largest = values.new_full((B + 1, D), float("-inf")).scatter_reduce(0, to, values, "amax").gather(0, to)
    first = first_in_bag((values == largest) | (values.isnan() & largest.isnan()))
    return torch.cat([rows, rows.new_zeros(1, D)]).gather(0, first[:B])
