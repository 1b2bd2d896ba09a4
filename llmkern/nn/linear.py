"""``Linear``: torch's module over ``llmkern.functional``."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from .. import functional as F
from ._deploy import Deployable


class Linear(torch.nn.Linear, Deployable):
    """``x weight^T + bias``; see :class:`torch.nn.Linear`. Same arguments and parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
