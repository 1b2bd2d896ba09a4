"""Sparse gradients of tables: the rows that were looked up, and nothing of the others."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_gradient(rows: Tensor, values: Tensor, num_weights: int) -> Tensor:
    """Coalesced, of ``rows`` (R), ascending, and ``values`` (R, D)."""
    size = (num_weights, values.shape[1])
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, size, is_coalesced=True, check_invariants=False)


def differentiable_sparse_gradient(indices: Tensor, values: Tensor, num_weights: int, padding_idx: int) -> Tensor:
    """As torch gives it: with duplicates, and a graph to ``values`` (N, D)."""
    if padding_idx >= 0:
        present = indices != padding_idx
        indices, values = indices[present], values[present]
    return torch.sparse_coo_tensor(indices.unsqueeze(0), values, (num_weights, values.shape[1]))
