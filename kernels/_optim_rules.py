"""What an optimizer does to elements in registers; who loads and stores them is the caller's business.

A rule is a name, at most three states per element and nine numbers. The same rule gives the same bits wherever it is
applied (dense tensors, sparse rows, rows that catch up): launch with ``fp_fusion=False``, products are fused into sums
where ``fma`` says so and nowhere else, and divisions and roots are those of IEEE. The order of operations is that of
torch's single-tensor functions, fused multiply-adds included.

The numbers are made on the host, in double precision, and rounded once to what the arithmetic is done in. They enter a
kernel as ``float64`` parameters, so that a new learning rate or step compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# States of each rule, in order. Adam: exp_avg, exp_avg_sq, and for amsgrad max_exp_avg_sq. Momentum: its buffer, which
# the first step only writes. Adagrad: the sum of squares. Sparse Adam: exp_avg, exp_avg_sq.
STATES = {"sgd": 0, "momentum": 1, "adagrad": 1, "adam": 2, "amsgrad": 3, "sparse_adam": 2}
# Of any rule.
NUMBERS = 9


@triton.jit
def divide(x, y):
    """x / y, rounded correctly: Triton's own quotient is not in fp32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def numbers_in(factor_ptr, numbers, ACC: tl.constexpr):
    """A rule's numbers, given in fp64, as ``update`` takes them. The first is for gradients, and so is the scalar at
    ``factor_ptr``, if there is one."""
    first = numbers[0]
    if factor_ptr is not None:
        first = tl.load(factor_ptr) * first
    rounded = (tl.full((), first, ACC),)
    for k in tl.static_range(1, len(numbers)):
        rounded += (tl.full((), numbers[k], ACC),)
    return rounded


@triton.jit
def _with_l2(p, g, factor, l2):
    g = factor * g
    # Not fma with zero: the parameter may be infinite.
    return tl.where(l2 != 0, tl.fma(l2 + tl.zeros_like(p), p, g), g)


@triton.jit
def _adam(p, g, states, numbers, AMSGRAD: tl.constexpr):
    factor, l2, shrink, weight1, weight2, beta2, eps, step_size, correction = numbers
    m, v = states[0], states[1]
    g = _with_l2(p, g, factor, l2)
    # torch's lerp takes the end that loses less.
    below = weight1 < 0.5
    weight = tl.where(below, weight1, weight1 - 1)
    m = tl.fma(weight + tl.zeros_like(p), g - m, tl.where(below, m, g))
    v = tl.fma(weight2 * g, g, v * beta2)
    largest = v
    new = (m, v)
    if AMSGRAD:
        largest = tl.where(states[2] > v, states[2], v)
        new += (largest,)
    p = p * shrink - divide(step_size * m, divide(root(largest), correction + tl.zeros_like(p)) + eps)
    return p, new


@triton.jit
def _sgd(p, g, states, numbers, MOMENTUM: tl.constexpr):
    factor, l2, keep, take, minus_lr, first, nesterov, _, _ = numbers
    zero = tl.zeros_like(p)
    g = _with_l2(p, g, factor, l2)
    new = ()
    if MOMENTUM:
        buffer = tl.where(first != 0, g, tl.fma(take + zero, g, states[0] * keep))
        g = tl.where(nesterov != 0, tl.fma(keep + zero, buffer, g), buffer)
        new += (buffer,)
    return tl.fma(minus_lr + zero, g, p), new


@triton.jit
def _adagrad(p, g, states, numbers):
    factor, l2, eps, step_size, _, _, _, _, _ = numbers
    g = _with_l2(p, g, factor, l2)
    total = tl.fma(g, g, states[0])
    return p - divide(step_size * g, root(total) + eps), (total,)


@triton.jit
def _sparse_adam(p, g, states, numbers):
    factor, weight1, weight2, eps, step_size, _, _, _, _ = numbers
    m, v = states
    g = factor * g
    m = m + weight1 * (g - m)
    v = v + weight2 * (g * g - v)
    return p - step_size * divide(m, root(v) + eps), (m, v)


@triton.jit
def update(p, g, states, numbers, RULE: tl.constexpr):
    """Parameter and states after a step with gradient ``g``."""
    if RULE == "adam" or RULE == "amsgrad":
        p, states = _adam(p, g, states, numbers, RULE == "amsgrad")
    elif RULE == "sgd" or RULE == "momentum":
        p, states = _sgd(p, g, states, numbers, RULE == "momentum")
    elif RULE == "adagrad":
        p, states = _adagrad(p, g, states, numbers)
    else:
        p, states = _sparse_adam(p, g, states, numbers)
    return p, states


def factored(grad_scale: float | Tensor) -> tuple[Tensor | None, float]:
    """What gradients are multiplied by as a tensor that kernels read, or None, and as a number besides."""
    return (grad_scale.double(), 1.0) if isinstance(grad_scale, Tensor) else (None, grad_scale)


def _nine(*numbers: float) -> tuple[float, ...]:
    return tuple(map(float, numbers)) + (0.0,) * (NUMBERS - len(numbers))


def adam(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    maximize: bool, grad_scale: float,
) -> tuple[float, ...]:  # fmt: skip
    """The numbers of ``"adam"`` and ``"amsgrad"``; ``step`` counts from 1."""
    shrink, l2 = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    factor, step_size = -grad_scale if maximize else grad_scale, lr / (1 - beta1**step)
    return _nine(factor, l2, shrink, 1 - beta1, 1 - beta2, beta2, eps, step_size, (1 - beta2**step) ** 0.5)


def sgd(
    step: float, lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool,
    grad_scale: float,
) -> tuple[float, ...]:  # fmt: skip
    """The numbers of ``"sgd"`` and ``"momentum"``, whose step 1 begins the buffer."""
    factor = -grad_scale if maximize else grad_scale
    return _nine(factor, weight_decay, momentum, 1 - dampening, -lr, step == 1, nesterov)


def adagrad(
    step: float, lr: float, lr_decay: float, weight_decay: float, eps: float, maximize: bool, grad_scale: float
) -> tuple[float, ...]:
    """The numbers of ``"adagrad"``."""
    return _nine(-grad_scale if maximize else grad_scale, weight_decay, eps, lr / (1 + (step - 1) * lr_decay))


def sparse_adam(
    step: float, lr: float, beta1: float, beta2: float, eps: float, maximize: bool, grad_scale: float
) -> tuple[float, ...]:
    """The numbers of ``"sparse_adam"``."""
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return _nine(-grad_scale if maximize else grad_scale, 1 - beta1, 1 - beta2, eps, step_size)
