"""Cross-entropy from logits, per row.

With z = cap(logit_scale * x), cap(u) = softcap * tanh(u / softcap), e the label smoothing and lse = logsumexp(z):

    loss = (1 - e) w[y] (lse - z[y]) + e/V * sum_c w[c] (lse - z[c]) + z_loss * lse^2

Class probabilities t in place of an index y:

    loss = -sum_c w[c] ((1 - e) t[c] + e/V) log_softmax(z)[c] + z_loss * lse^2
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Losses (N), in fp32 (fp64 for fp64), of ``logits`` (N, V) and ``target``: indices (N) or probabilities (N, V).

    ``softcap`` 0: none. Rows whose index is ``ignore_index`` have loss 0.

    Raises:
        IndexError: if an index is neither ``ignore_index`` nor in [0, V).
    """
    accumulated = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(accumulated) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(-1)
    V = logits.shape[-1]
    weights = None if weight is None else weight.to(accumulated)
    if target.is_floating_point():
        t = target.to(accumulated)
        t = t if label_smoothing == 0 else t * (1 - label_smoothing) + label_smoothing / V
        losses = -(log_p * t if weights is None else log_p * t * weights).sum(-1)
        ignored = None
    else:
        ignored = target == ignore_index
        y = target.masked_fill(ignored, 0)
        # Under a transform or a compiler no value can be looked at; gather itself stays inside memory.
        if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            for bad in y[(y < 0) | (y >= V)]:
                raise IndexError(f"Target {int(bad)} is out of bounds.")
        losses = -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        losses = losses if weights is None else losses * weights[y]
        if label_smoothing:
            uniform = -(log_p if weights is None else log_p * weights).sum(-1)
            losses = (1 - label_smoothing) * losses + label_smoothing / V * uniform
    if z_loss:
        losses = losses + z_loss * z.logsumexp(-1).square()
    return losses if ignored is None else losses.masked_fill(ignored, 0)
