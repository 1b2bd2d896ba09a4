"""Cross-entropy of linearly transformed inputs: the composition, with logits in fp32 or fp64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """``input`` (N, H) or (H), ``linear_weight`` (C, ..., H), ``linear_bias`` (C, ...).

    ``target`` and ``options`` are those of :func:`llmkern.reference.cross_entropy`, for logits (N, C, ...).
    """
    accumulate = torch.promote_types(input.dtype, torch.float32)
    features = linear_weight.shape[-1]
    bias = None if linear_bias is None else linear_bias.reshape(-1).to(accumulate)
    logits = F.linear(input.to(accumulate), linear_weight.reshape(-1, features).to(accumulate), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return reference.cross_entropy(logits, target, **options).to(input.dtype)
