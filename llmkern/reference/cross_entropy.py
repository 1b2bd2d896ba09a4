"""Cross-entropy from logits, per row.

With z = cap(logit_scale * x), cap(u) = softcap * tanh(u / softcap), e the label smoothing and lse = logsumexp(z):

    loss = (1 - e) w[y] (lse - z[y]) + e/V * sum_c w[c] (lse - z[c]) + z_loss * lse^2

Class probabilities t in place of an index y:

    loss = -sum_c w[c] ((1 - e) t[c] + e/V) log_softmax(z)[c] + z_loss * lse^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from .._groups import LossOptions

# exp of it is 0: keeps p log p at 0 where p is, and its derivative too.
_NOTHING = -800.0


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    options: LossOptions = LossOptions(),  # noqa: B008
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, logsumexp, entropy (in nats) and argmax of every row.

    Args:
        logits: ``(N, V, *)``.
        target: indices ``(N, *)`` or probabilities ``(N, V, *)``.
        weight: ``(V)``. Default: ones.

    Returns:
        Four tensors ``(N, *)``, in fp32 (fp64 for fp64), the last in int64. Rows whose index is ``ignore_index``
        have 0, and argmax -1.

    Raises:
        IndexError: if an index is neither ``ignore_index`` nor in [0, V).
    """
    ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    accumulated = accumulate_dtype(logits.dtype)
    z = logits.to(accumulated) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(1)
    V = logits.shape[1]
    weights = None if weight is None else weight.to(accumulated).reshape(-1, *[1] * (z.dim() - 2))
    if target.is_floating_point():
        t = target.to(accumulated)
        t = t if label_smoothing == 0 else t * (1 - label_smoothing) + label_smoothing / V
        losses = -(log_p * t if weights is None else log_p * t * weights).sum(1)
        ignored = None
    else:
        ignored = target == ignore_index
        y = target.masked_fill(ignored, 0)
        # Under a transform or a compiler no value can be looked at; gather itself stays inside memory.
        if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            for bad in y[(y < 0) | (y >= V)]:
                raise IndexError(f"Target {int(bad)} is out of bounds.")
        losses = -log_p.gather(1, y.unsqueeze(1)).squeeze(1)
        losses = losses if weights is None else losses * weights.flatten()[y]
        if label_smoothing:
            uniform = -(log_p if weights is None else log_p * weights).sum(1)
            losses = (1 - label_smoothing) * losses + label_smoothing / V * uniform
    lse = z.logsumexp(1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    entropy = -(log_p.exp() * log_p.clamp(min=_NOTHING)).sum(1)
    argmax = z.argmax(1)
    if ignored is not None:
        losses, lse, entropy = (row.masked_fill(ignored, 0) for row in (losses, lse, entropy))
        argmax = argmax.masked_fill(ignored, -1)
    return losses, lse, entropy, argmax
