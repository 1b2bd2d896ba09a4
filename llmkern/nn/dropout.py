"""``Dropout``: torch's module over ``llmkern.functional``."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from .. import functional as F
from ._deploy import Deployable


class Dropout(torch.nn.Dropout, Deployable):
    """Zeroes elements in training; see :class:`torch.nn.Dropout` and :func:`llmkern.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)
