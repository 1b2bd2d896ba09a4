"""``MSELoss``: torch's module over ``llmkern.functional``."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from .. import functional as F
from ._deploy import Deployable


class MSELoss(torch.nn.MSELoss, Deployable):
    """Mean squared error; see :class:`torch.nn.MSELoss`. Same arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)
