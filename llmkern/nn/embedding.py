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
