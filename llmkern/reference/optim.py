"""Optimizer steps, one tensor at a time. They write to parameters and states, as optimizers do.

Common to all: arithmetic is in fp32 (fp64 for fp64), and results are rounded once. ``steps`` count from 1. Gradients
are multiplied by ``grad_scale``, and negated if ``maximize``. ``after`` is what becomes of them: ``"keep"`` leaves
them, ``"zero"`` makes them zero, ``"scale"`` multiplies them by ``grad_scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def _gradient(grad: Tensor, p: Tensor, decay: float, maximize: bool, grad_scale: float | Tensor, after: str) -> Tensor:
    g = _wide(grad) * grad_scale
    if after != "keep":
        grad.copy_(g if after == "scale" else torch.zeros_like(g))
    g = -g if maximize else g
    return g + decay * p if decay else g


def advance(steps: list[Tensor]) -> list[float]:
    """Counts one step more in each, and gives the counts."""
    torch._foreach_add_(steps, 1)
    return [float(step) for step in steps]


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
    grad_scale: float | Tensor = 1.0,
    after: str = "keep",
) -> None:
    """Adam (arXiv 1412.6980, algorithm 1), or with ``decoupled`` AdamW (arXiv 1711.05101), in place.

    With g the gradient (plus ``weight_decay`` * p if not decoupled) and t the step:

        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr weight_decay, if decoupled) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    ``max_exp_avg_sqs``: empty, or for amsgrad the running maxima that take v's place in the root.
    """
    for i, param in enumerate(params):
        p, m, v = (_wide(t) for t in (param, exp_avgs[i], exp_avg_sqs[i]))
        g = _gradient(grads[i], p, 0.0 if decoupled else weight_decay, maximize, grad_scale, after)
        if decoupled:
            p = p * (1 - lr * weight_decay)
        m, v = torch.lerp(m, g, 1 - beta1), v * beta2 + (1 - beta2) * g * g
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        if max_exp_avg_sqs:
            v = torch.maximum(_wide(max_exp_avg_sqs[i]), v)
            max_exp_avg_sqs[i].copy_(v)
        root = v.sqrt() / (1 - beta2 ** steps[i]) ** 0.5
        param.copy_(p - lr / (1 - beta1 ** steps[i]) * m / (root + eps))


def sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[float],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: float | Tensor = 1.0,
    after: str = "keep",
) -> None:
    """Stochastic gradient descent, in place, with g the gradient plus ``weight_decay`` * p:

        b = g at step 1, then momentum b + (1 - dampening) g
        p = p - lr (g + momentum b, if nesterov; else b)

    ``momentum_buffers``: b, or empty for p = p - lr g.
    """
    for i, param in enumerate(params):
        p = _wide(param)
        g = _gradient(grads[i], p, weight_decay, maximize, grad_scale, after)
        if momentum_buffers:
            b = g if steps[i] == 1 else momentum * _wide(momentum_buffers[i]) + (1 - dampening) * g
            momentum_buffers[i].copy_(b)
            g = g + momentum * b if nesterov else b
        param.copy_(p - lr * g)


def adagrad_step(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    steps: list[float],
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    grad_scale: float | Tensor = 1.0,
    after: str = "keep",
) -> None:
    """Adagrad (Duchi et al., JMLR 12, 2011), in place, with g the gradient plus ``weight_decay`` * p and t the step:

    s = s + g^2;  p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)
    """
    for i, param in enumerate(params):
        p = _wide(param)
        g = _gradient(grads[i], p, weight_decay, maximize, grad_scale, after)
        s = _wide(sums[i]) + g * g
        sums[i].copy_(s)
        param.copy_(p - lr / (1 + (steps[i] - 1) * lr_decay) * g / (s.sqrt() + eps))
