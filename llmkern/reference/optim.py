"""Optimizer steps, one tensor at a time. They write to parameters and states, as optimizers do."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """Adam (arXiv 1412.6980, algorithm 1), or with ``decoupled`` AdamW (arXiv 1711.05101), in place.

    With g the gradient (negated if ``maximize``; plus ``weight_decay`` * p if not decoupled) and t the step:

        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr weight_decay, if decoupled) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    ``max_exp_avg_sqs``: empty, or for amsgrad the running maxima that take v's place in the root. ``steps`` count
    from 1. Arithmetic is in fp32 (fp64 for fp64); results are rounded once.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        p, g, m, v = (t.to(wide) for t in (param, grad, exp_avgs[i], exp_avg_sqs[i]))
        g = -g if maximize else g
        if weight_decay and decoupled:
            p = p * (1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        m, v = torch.lerp(m, g, 1 - beta1), v * beta2 + (1 - beta2) * g * g
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        if max_exp_avg_sqs:
            v = torch.maximum(max_exp_avg_sqs[i].to(wide), v)
            max_exp_avg_sqs[i].copy_(v)
        root = v.sqrt() / (1 - beta2 ** steps[i]) ** 0.5
        param.copy_(p - lr / (1 - beta1 ** steps[i]) * m / (root + eps))
