"""Cross-entropy of linearly transformed inputs: the composition, with logits in fp32 or fp64."""

from __future__ import annotations

from torch import Tensor

from .._facts import accumulate_dtype
from .._groups import LossOptions
from .._torch import F
from .cross_entropy import cross_entropy


def linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None = None,
    options: LossOptions = LossOptions(),  # noqa: B008
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`llmkern.reference.cross_entropy` gives for the logits of ``x`` (N, H).

    ``linear_weight`` (V, H), ``linear_bias`` (V) or None; the rest is as there.
    """
    accumulate = accumulate_dtype(x.dtype)
    bias = None if linear_bias is None else linear_bias.to(accumulate)
    logits = F.linear(x.to(accumulate), linear_weight.to(accumulate), bias)
    return cross_entropy(logits, target, weight, options)
