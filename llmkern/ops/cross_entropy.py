"""``llmkern::cross_entropy_forward``, ``_forward_`` and ``_backward``: per-row outputs from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define
from ._losses import empty_rows


def _like(t: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(t) if wanted else t.new_empty(0)


# Logits (N, V) or (N, V, D), targets (N), (N, D) or probabilities of the logits' shape. With dloss the gradients that
# it gives are made in the same pass; what is not wanted comes back empty.
define(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? dloss, LossOptions, bool entropy,"
    " bool argmax, bool need_logits, bool need_target)"
    " -> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, Tensor dlogits, Tensor dtarget)",
    lambda logits, target, weight, dloss, options, entropy, argmax, need_logits, need_target: (
        *empty_rows(logits, (logits.shape[0], *logits.shape[2:]), entropy, argmax),
        _like(logits, need_logits),
        _like(target, need_target),
    ),
)
# The gradient takes the logits' place.
define(
    "cross_entropy_forward_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor dloss, LossOptions, bool entropy,"
    " bool argmax, bool need_target)"
    " -> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, Tensor dtarget)",
    lambda logits, target, weight, dloss, options, entropy, argmax, need_target: (
        *empty_rows(logits, (logits.shape[0], *logits.shape[2:]), entropy, argmax),
        _like(target, need_target),
    ),
)
define(
    "cross_entropy_backward(Tensor? dloss, Tensor? dlse, Tensor? dentropy, Tensor logits, Tensor target,"
    " Tensor? weight, LossOptions, bool need_logits, bool need_target)"
    " -> (Tensor dlogits, Tensor dtarget)",
    lambda dloss, dlse, dentropy, logits, target, weight, options, need_logits, need_target: (
        _like(logits, need_logits),
        _like(target, need_target),
    ),
)
