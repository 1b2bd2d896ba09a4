"""``QuantizedEmbedding``: a lookup table of 8 or 4 bits an element, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn
from torch import Tensor

from .. import functional as F
from ._deploy import Deployable


class QuantizedEmbedding(torch.nn.Module, Deployable):
    """A lookup table of 8 or 4 bits an element with a scale and an offset for each row; no gradient.

    Made by :func:`llmkern.quantize_embedding`; the constructor makes a table of zeros, to load a ``state_dict`` into.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        bits: 8 or 4. Default: 8.
        padding_idx: kept for whoever asks; it changes nothing without gradients. Default: none.
        dtype: of the results; ``module.to(dtype)`` changes it. Default: torch's default dtype.

    Buffers, as of :func:`llmkern.functional.quantize_rows`, where the error bound stands:
        weight: uint8 ``(V, D)``, or ``(V, ceil(D / 2))``. scale, offset: float32 ``(V)``, whatever ``dtype`` is.
    """

    weight: Tensor
    scale: Tensor
    offset: Tensor
    _like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits not in (8, 4):
            raise ValueError(f"bits: got {bits!r}, expected 8 or 4")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: got {padding_idx}, expected a row of {num_embeddings}")
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        width = embedding_dim if bits == 8 else (embedding_dim + 1) // 2
        self.register_buffer("weight", torch.zeros(num_embeddings, width, dtype=torch.uint8, device=device))
        for name in ("scale", "offset"):
            self.register_buffer(name, torch.zeros(num_embeddings, dtype=torch.float32, device=device))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return self._like.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        scale, offset = self.scale, self.offset
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            # A change of dtype is one of the results: rounded scales would break the error bound.
            self.scale, self.offset = scale.to(self.scale.device), offset.to(self.offset.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``(*)`` to ``(*, D)``."""
        return F.quantized_embedding(
            input, self.weight, self.scale, self.offset, self.embedding_dim, self.bits, self.dtype
        )

    def dequantize(self) -> Tensor:
        """The whole table, ``(V, D)``."""
        return self(torch.arange(self.num_embeddings, device=self.weight.device))

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}{padding}, dtype={self.dtype}"


def quantize_embedding(module_or_weight: torch.nn.Embedding | Tensor, bits: int = 8) -> QuantizedEmbedding:
    """A :class:`QuantizedEmbedding` of a trained embedding, for inference; a copy, the original stays as it is.

    Args:
        module_or_weight: a :class:`torch.nn.Embedding`, or a floating table ``(V, D)``.
        bits: 8 or 4: the table takes a quarter or an eighth of float32's memory, and 8 bytes a row. Default: 8.

    Returns:
        A module whose results have the dtype of the original, and its ``padding_idx``. They differ from the original
        by ``scale / 2`` and rounding at most, ``scale`` being the row's range over ``2^bits - 1``; the exact bound
        stands at :func:`llmkern.functional.quantize_rows`.

    Raises:
        ValueError: for other ``bits``, a row that is not finite, or a module with ``max_norm``, whose rows change when
            they are looked up.
        TypeError: if it is neither an embedding nor a tensor.
    """
    padding_idx, weight = None, module_or_weight
    if isinstance(module_or_weight, torch.nn.Embedding):
        if module_or_weight.max_norm is not None:
            raise ValueError(
                "quantize_embedding: got a module with max_norm; expected None: renormalise its rows first"
            )
        padding_idx, weight = module_or_weight.padding_idx, module_or_weight.weight
    if not isinstance(weight, Tensor):
        name = type(module_or_weight).__name__
        raise TypeError(f"quantize_embedding: got {name}, expected a torch.nn.Embedding or a table (V, D)")
    data, scale, offset = F.quantize_rows(weight, bits)
    V, D = weight.shape
    result = QuantizedEmbedding(V, D, bits, padding_idx, torch.device("meta"), weight.dtype)
    result.weight, result.scale, result.offset = data, scale, offset
    result._like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    result.training = isinstance(module_or_weight, torch.nn.Module) and module_or_weight.training
    return result
