"""``llmkern::linear_cross_entropy_forward`` and ``_backward``: per-row outputs from the input of a linear layer."""

from __future__ import annotations

from torch import Tensor

from ._library import define
from ._losses import empty_rows


def _gradients(x: Tensor, linear_weight: Tensor, target: Tensor, *need: bool) -> tuple[Tensor, ...]:
    shapes = (x, linear_weight, linear_weight[:, 0], target)
    return tuple(t.new_empty(t.shape if wanted else (0,)) for t, wanted in zip(shapes, need, strict=True))


_NEED = "bool need_x, bool need_weight, bool need_bias, bool need_target"
_GRADIENTS = "Tensor dx, Tensor dlinear_weight, Tensor dlinear_bias, Tensor dtarget"
# x (N, H), targets (N) or probabilities (N, V). With dloss the gradients that it gives are made at once; what is not
# wanted comes back empty. workspace: bytes that logits and their gradients may take.
define(
    "linear_cross_entropy_forward(Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    f" Tensor? dloss, LossOptions, int workspace, bool entropy, bool argmax, {_NEED})"
    f" -> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, {_GRADIENTS})",
    lambda x, linear_weight, linear_bias, target, weight, dloss, options, workspace, entropy, argmax, *need: (
        *empty_rows(x, x.shape[:1], entropy, argmax),
        *_gradients(x, linear_weight, target, *need),
    ),
)
define(
    "linear_cross_entropy_backward(Tensor? dloss, Tensor? dlse, Tensor? dentropy, Tensor x, Tensor linear_weight,"
    f" Tensor? linear_bias, Tensor target, Tensor? weight, LossOptions, int workspace, {_NEED})"
    f" -> ({_GRADIENTS})",
    lambda dloss, dlse, dentropy, x, linear_weight, linear_bias, target, weight, options, workspace, *need: (
        _gradients(x, linear_weight, target, *need)
    ),
)
