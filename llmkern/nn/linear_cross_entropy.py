"""``LinearCrossEntropyLoss``: torch 2.13's module, for every torch that llmkern supports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from .. import functional as F
from ..functional.linear_cross_entropy import WORKSPACE
from ._deploy import Deployable

_Base: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class LinearCrossEntropyLoss(_Base, Deployable):
    """Cross-entropy of a linear layer's logits; see torch 2.13's module of that name.

    Args:
        in_features: H.
        num_classes: C.
        out_features: ``(d_1, ..., d_K)`` of a K-dimensional loss. Default: ``()``.
        bias: gives the linear layer a bias. Default: ``False``.
        device, dtype: of the linear layer. Default: torch's.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        weight: a factor ``(C,)`` for each class. Default: none.
        ignore_index: a class index that counts for nothing. Default: -100.
        label_smoothing: in ``[0, 1]``. Default: 0.
        options: ``torch.nn.LinearCrossEntropyOptions``. Default: none.
        z_loss, softcap, logit_scale, outputs, workspace: as in :func:`llmkern.functional.linear_cross_entropy`, like
            the ``token_weight`` of ``forward``. Default: neutral; 64 MiB.

    Raises:
        RuntimeError: for a ``weight`` that is not ``(C,)``, or a ``label_smoothing`` outside ``[0, 1]``.

    The parameters are those of ``self.linear``: weight ``(C * d_1 * ... * d_K, H)`` and, if wanted, bias.
    """

    _beyond_torch: ClassVar[dict[str, Any]] = {"z_loss": 0.0, "softcap": None, "logit_scale": 1.0, "outputs": ()}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = (),
        workspace: int = WORKSPACE,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        # Not super(): torch's class, where there is one, would build the parameters a second time.
        _WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        rows = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.options = options
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.outputs, self.workspace = outputs, workspace

    def forward(self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None) -> Any:
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            outputs=self.outputs,
            workspace=self.workspace,
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None},"
            f" reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )
        own = {**self._beyond_torch, "workspace": WORKSPACE}
        return text + "".join(
            f", {name}={getattr(self, name)}" for name, neutral in own.items() if getattr(self, name) != neutral
        )
