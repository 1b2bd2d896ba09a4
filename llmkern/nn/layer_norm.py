"""``LayerNorm`` and ``RMSNorm``: torch's modules over ``llmkern.functional``."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from .. import functional as F
from ._deploy import Deployable


class LayerNorm(torch.nn.LayerNorm, Deployable):
    """Layer normalisation; see :class:`torch.nn.LayerNorm`. Same arguments and parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm, Deployable):
    """Root-mean-square normalisation; see :class:`torch.nn.RMSNorm`. Same arguments and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
