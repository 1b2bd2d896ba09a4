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
def numbers_in(factor_ptr, n0, n1, n2, n3, n4, n5, n6, n7, n8, ACC: tl.constexpr):
    """A rule's numbers, given in fp64, as the tuple that ``update`` takes. The first is for gradients, and so is the
    scalar at ``factor_ptr``, if there is one."""
    if factor_ptr is not None:
        n0 = tl.load(factor_ptr) * n0
    return (
        tl.full((), n0, ACC), tl.full((), n1, ACC), tl.full((), n2, ACC), tl.full((), n3, ACC), tl.full((), n4, ACC),
        tl.full((), n5, ACC), tl.full((), n6, ACC), tl.full((), n7, ACC), tl.full((), n8, ACC),
    )  # fmt: skip


@triton.jit
def _with_l2(p, g, factor, l2):
    g = factor * g
    # Not fma with zero: the parameter may be infinite.
    return tl.where(l2 != 0, tl.fma(l2 + tl.zeros_like(p), p, g), g)


@triton.jit
def _adam(p, g, m, v, largest, numbers, AMSGRAD: tl.constexpr):
    factor, l2, shrink, weight1, weight2, beta2, eps, step_size, correction = numbers
    g = _with_l2(p, g, factor, l2)
    # torch's lerp takes the end that loses less.
    below = weight1 < 0.5
    weight = tl.where(below, weight1, weight1 - 1)
    m = tl.fma(weight + tl.zeros_like(p), g - m, tl.where(below, m, g))
    v = tl.fma(weight2 * g, g, v * beta2)
    denominator = v
    if AMSGRAD:
        largest = tl.where(largest > v, largest, v)
        denominator = largest
    p = p * shrink - divide(step_size * m, divide(root(denominator), correction + tl.zeros_like(p)) + eps)
    return p, m, v, largest


@triton.jit
def _sgd(p, g, buffer, numbers, MOMENTUM: tl.constexpr):
    factor, l2, keep, take, minus_lr, first, nesterov, _, _ = numbers
    zero = tl.zeros_like(p)
    g = _with_l2(p, g, factor, l2)
    if MOMENTUM:
        buffer = tl.where(first != 0, g, tl.fma(take + zero, g, buffer * keep))
        g = tl.where(nesterov != 0, tl.fma(keep + zero, buffer, g), buffer)
    return tl.fma(minus_lr + zero, g, p), buffer


@triton.jit
def _adagrad(p, g, total, numbers):
    factor, l2, eps, step_size, _, _, _, _, _ = numbers
    g = _with_l2(p, g, factor, l2)
    total = tl.fma(g, g, total)
    return p - divide(step_size * g, root(total) + eps), total


@triton.jit
def _sparse_adam(p, g, m, v, numbers):
    factor, weight1, weight2, eps, step_size, _, _, _, _ = numbers
    g = factor * g
    m = m + weight1 * (g - m)
    v = v + weight2 * (g * g - v)
    return p - step_size * divide(m, root(v) + eps), m, v


@triton.jit
def update(p, g, s0, s1, s2, numbers, RULE: tl.constexpr):
    """Parameter and states after a step with gradient ``g``; a state that the rule has not is handed through."""
    if RULE == "adam" or RULE == "amsgrad":
        p, s0, s1, s2 = _adam(p, g, s0, s1, s2, numbers, RULE == "amsgrad")
    elif RULE == "sgd" or RULE == "momentum":
        p, s0 = _sgd(p, g, s0, numbers, RULE == "momentum")
    elif RULE == "adagrad":
        p, s0 = _adagrad(p, g, s0, numbers)
    else:
        p, s0, s1 = _sparse_adam(p, g, s0, s1, numbers)
    return p, s0, s1, s2


@triton.jit
def load_states(s0_ptr, s1_ptr, s2_ptr, i, mask, like):
    """The states at ``i`` as wide as ``like``, which stands for those that are not there."""
    s0, s1, s2 = like, like, like
    if s0_ptr is not None:
        s0 = tl.load(s0_ptr + i, mask=mask).to(like.dtype)
    if s1_ptr is not None:
        s1 = tl.load(s1_ptr + i, mask=mask).to(like.dtype)
    if s2_ptr is not None:
        s2 = tl.load(s2_ptr + i, mask=mask).to(like.dtype)
    return s0, s1, s2


@triton.jit
def store_states(s0_ptr, s1_ptr, s2_ptr, i, mask, s0, s1, s2):
    if s0_ptr is not None:
        tl.store(s0_ptr + i, s0.to(s0_ptr.dtype.element_ty), mask=mask)
    if s1_ptr is not None:
        tl.store(s1_ptr + i, s1.to(s1_ptr.dtype.element_ty), mask=mask)
    if s2_ptr is not None:
        tl.store(s2_ptr + i, s2.to(s2_ptr.dtype.element_ty), mask=mask)


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
