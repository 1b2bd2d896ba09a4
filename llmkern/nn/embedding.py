"""``Embedding`` and ``EmbeddingBag``: torch's modules over ``llmkern.functional``."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from .. import functional as F


class Embedding(torch.nn.Embedding):
    """A lookup table; see :class:`torch.nn.Embedding`. Same arguments, parameters and ``from_pretrained``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class EmbeddingBag(torch.nn.EmbeddingBag):
    """Sums, means or maxes of bags; see :class:`torch.nn.EmbeddingBag`.

    Same arguments, parameters and ``from_pretrained``.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
