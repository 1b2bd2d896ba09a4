"""``llmkern::quantized_embedding_forward`` and ``_quantize``: for inference, without derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.quantized_embedding import quantize_rows as reference_quantize_rows
from ..reference.quantized_embedding import quantized_embedding as reference
from ._library import define

quantized_embedding_forward = define(
    "quantized_embedding_forward(Tensor weight, Tensor scale, Tensor offset, Tensor indices, SymInt embedding_dim,"
    " int bits, ScalarType dtype) -> Tensor",
    lambda weight, scale, offset, indices, embedding_dim, bits, dtype: scale.new_empty(
        (indices.shape[0], embedding_dim), dtype=dtype
    ),
)
quantized_embedding_quantize = define(
    "quantized_embedding_quantize(Tensor weight, int bits) -> (Tensor data, Tensor scale, Tensor offset)",
    lambda weight, bits: (
        weight.new_empty((weight.shape[0], (weight.shape[1] * bits + 7) // 8), dtype=torch.uint8),
        *(weight.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2)),
    ),
)


def quantize_rows(weight: Tensor, bits: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(data, scale, offset) of a contiguous ``weight`` (V, D), as :func:`llmkern.reference.quantize_rows`."""
    if backend == "reference":
        return reference_quantize_rows(weight, bits)
    return quantized_embedding_quantize(weight, bits, backend)


def quantized_embedding(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    indices: Tensor,
    embedding_dim: int,
    bits: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """(N, D) of ``dtype``; all tensors contiguous, ``indices`` (N)."""
    if backend == "reference":
        return reference(weight, scale, offset, indices, embedding_dim, bits, dtype)
    return quantized_embedding_forward(weight, scale, offset, indices, embedding_dim, bits, dtype, backend)
