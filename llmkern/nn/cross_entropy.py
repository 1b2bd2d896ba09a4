"""``CrossEntropyLoss`` and ``NLLLoss``: torch's modules over ``llmkern.functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn
from torch import Tensor

from .. import functional as F
from ._deploy import Deployable


class CrossEntropyLoss(torch.nn.CrossEntropyLoss, Deployable):
    """Cross-entropy from logits; see :class:`torch.nn.CrossEntropyLoss`.

    Takes five options more, with neutral defaults: ``z_loss``, ``softcap``, ``logit_scale``, ``outputs`` and
    ``inplace``, and a ``token_weight`` at call; see :func:`llmkern.functional.cross_entropy`.
    """

    _beyond_torch: ClassVar[dict[str, Any]] = {"z_loss": 0.0, "softcap": None, "logit_scale": 1.0, "outputs": ()}

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = (),
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.outputs, self.inplace = outputs, inplace

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            outputs=self.outputs,
            inplace=self.inplace,
        )


class NLLLoss(torch.nn.NLLLoss, Deployable):
    """Negative log-likelihood of log-probabilities; see :class:`torch.nn.NLLLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
