"""Cross-entropy of linearly transformed inputs, as ``torch.nn.functional`` has it from torch 2.13 on.

No kernel fuses the two yet: ``llmkern.functional.linear`` gives logits, its ``cross_entropy`` the loss.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, functional

_TORCH_CHUNKS = hasattr(F, "linear_cross_entropy")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``; see torch 2.13's function.

    Args:
        input: ``(*, H)``. torch takes at most one batch dimension, this function any number.
        linear_weight: ``(C, H)``, or ``(C, d_1, ..., d_K, H)`` for a K-dimensional loss, which needs a batch.
        target: indices ``(*, d_1, ..., d_K)`` in ``[0, C)``, or probabilities ``(*, C, d_1, ..., d_K)``.
        linear_bias: ``(C, d_1, ..., d_K)``. Default: none.
        weight: a factor ``(C,)`` for each class. Default: none.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        ignore_index: a class index that counts for nothing; not with probabilities. Default: -100.
        label_smoothing: in ``[0, 1]``, mixes the target with the uniform distribution. Default: 0.
        options: ``torch.nn.LinearCrossEntropyOptions``: torch's chunked function, which saves memory and has
            no second derivative; where torch cannot chunk, a warning says so. Default: none.
        z_loss: adds ``z_loss * logsumexp(logits)^2``. Default: 0.
        softcap: bounds the logits to ``softcap * tanh(logits / softcap)``. Default: off.
        logit_scale: multiplies the logits. Default: 1.
        token_weight: a factor ``(*, d_1, ..., d_K)`` for each row's loss. Default: none.

    The last four are llmkern's own; :func:`llmkern.functional.cross_entropy` defines them.

    Returns:
        A scalar, or ``(*, d_1, ..., d_K)`` for ``"none"``.

    Raises:
        RuntimeError: for shapes that do not fit, or an ``ignore_index`` with probabilities.
        IndexError: for a class index outside ``[0, C)``.
    """
    _check(input, linear_weight, target, linear_bias, ignore_index)
    batch, (num_classes, *out_features, in_features) = input.shape[:-1], linear_weight.shape
    if len(batch) > 1:
        rows = math.prod(batch)
        input, target = input.reshape(rows, in_features), target.reshape(rows, *target.shape[len(batch) :])
        token_weight = None if token_weight is None else token_weight.reshape(rows, *out_features)
    own: dict[str, Any] = {
        "z_loss": z_loss or None,
        "softcap": softcap,
        "logit_scale": None if logit_scale == 1.0 else logit_scale,
        "token_weight": token_weight,
    }
    extras = {name: value for name, value in own.items() if value is not None}
    common: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    chunked = options is not None and _can_chunk(extras)
    backend = dispatch.pick(
        "linear_cross_entropy",
        *(t for t in (input, linear_weight, linear_bias) if t is not None),
        options=[*extras, *["options"] * chunked],
        torch_does=None if chunked else "linear, then cross_entropy",
    )
    if chunked and backend == "torch":
        loss = F.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            options=options,
            **common,
        )
    else:
        flat_bias = None if linear_bias is None else linear_bias.reshape(-1)
        logits = functional.linear(input, linear_weight.reshape(-1, in_features), flat_bias)
        logits = logits.reshape(*input.shape[:-1], num_classes, *out_features)
        ignored = -100 if ignore_index is None else ignore_index
        loss = functional.cross_entropy(logits, target, ignore_index=ignored, **common, **extras)
    return loss.reshape(*batch, *out_features) if reduction == "none" and len(batch) > 1 else loss


def _can_chunk(extras: dict[str, Any]) -> bool:
    """Whether torch's chunked function knows the call; what torch itself cannot chunk, it says itself."""
    if _TORCH_CHUNKS and not extras:
        return True
    reason = f"it does not know {', '.join(extras)}" if extras else f"torch {torch.__version__} has none"
    warnings.warn(f"linear_cross_entropy: ``options`` ignored; chunked path: {reason}.", stacklevel=3)
    return False


def _check(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, ignore_index: int | None
) -> None:
    """torch's checks, in torch's order and words; a third batch dimension is no error here."""
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    batch, in_features = input.shape[:-1], input.shape[-1]
    if in_features != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    num_classes, *out_features = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if out_features and not batch:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires"
            f" batched input, (N, {in_features}), got unbatched"
            f" input with shape {tuple(input.shape)}"
        )
    indices, probabilities = (*batch, *out_features), (*batch, num_classes, *out_features)
    if target.shape == probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if len(batch) > 1 and tuple(target.shape) not in (indices, probabilities):
        raise RuntimeError(
            f"expected target shape {indices} (class indices) or {probabilities} (probabilities), "
            f"got {tuple(target.shape)}"
        )
