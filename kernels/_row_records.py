"""The step log of lazily updated tables: one launch a step, and no thread of the host waits for it.

A record is 31 doubles, laid out as ``RowRecord`` in ``csrc/core/row_optim.h``: the step, its rule's numbers, and in
closed form what this step and all later ones do to a row without a gradient. The formulas, and why two nodes of a
quadrature are enough for Adam, are in ``csrc/core/row_optim.cpp``. A new step extends every record; there are 4096 at
most, so this is a megabyte, and one thread a record.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._facts import ROW_RECORD

# Where a record has what. Adam's `keep`: of p, m, v; Sgd's: the 2 x 2 product.
SIZE = tl.constexpr(ROW_RECORD)
RULE_AT = tl.constexpr(6)
KEEP_AT = tl.constexpr(15)
WEIGHT_AT = tl.constexpr(19)
EPS_AT = tl.constexpr(21)
LEAST_AT = tl.constexpr(23)
MOMENTS_AT = tl.constexpr(24)
ORIGIN_AT = tl.constexpr(29)
COMPLETE_AT = tl.constexpr(30)

# Powers of two: 2^-23 and 2^-50.
TOLERANCE = tl.constexpr(1.1920928955078125e-07)
GONE = tl.constexpr(8.881784197001252e-16)
LONG_WAY = tl.constexpr(1000.0)
LARGEST = tl.constexpr(1e15)
SMALLEST = tl.constexpr(1e-18)


@triton.jit
def rule_numbers(record_ptr, ACC: tl.constexpr):
    """The nine numbers of the rule, as ``_optim_rules.update`` takes them."""
    numbers = ()
    for k in tl.static_range(9):
        numbers += (tl.load(record_ptr + RULE_AT + k).to(ACC),)
    return numbers


@triton.jit
def _quadrature(m0, m1, m2, m3, m4, origin, eps):
    """The two nodes and weights that have these moments, and where they are good enough: below ``least``, the root of
    v makes an element go step by step."""
    # About the mean.
    mean, second, third_moment = m1 / m0, m2 / m0, m3 / m0
    variance = second - mean * mean
    third = third_moment - 3 * mean * second + 2 * mean * mean * mean
    fourth = m4 / m0 - 4 * mean * third_moment + 6 * mean * mean * second - 3 * mean * mean * mean * mean
    y = origin + mean
    # How far y has come: beyond, its moments say nothing of where it began.
    way = y / origin
    lost = ~(way < LONG_WAY)
    several = variance > 1e-12 * y * y
    half = third / variance / 2
    root = tl.sqrt(half * half + variance)
    low, high = half - root, half + root
    weight0 = tl.where(several, m0 * high / (high - low), m0)
    weight1 = tl.where(several, m0 * -low / (high - low), 0.0)
    eps0 = tl.where(several, eps * (y + low), eps * y)
    eps1 = tl.where(several, eps * (y + high), eps * y)
    # The remainder of the quadrature of 1 / (1 + x y), relative to it: at most `rest` (x y / (1 + x y))^4.
    far, squared = way * way, y * y
    rest = (fourth - variance * variance - third * third / variance) / (squared * squared) * (far * far * way)
    ratio = tl.sqrt(tl.sqrt(1 / rest * TOLERANCE))
    rough = several & ~lost & ~(rest <= TOLERANCE)
    least = tl.where(rough, eps * y * (1 - ratio) / ratio, tl.where(lost, float("inf"), 0.0))
    # Nothing has moved.
    still = ~(m0 > 0)
    return (
        tl.where(still, m0, weight0), tl.where(still, 0.0, weight1), tl.where(still, eps * origin, eps0),
        tl.where(still, eps * origin, eps1), tl.where(still, 0.0, least),
    )  # fmt: skip


@triton.jit
def extend_adam(record, new, mask, beta1, beta2, eps, shrink, correction2, speed, AMSGRAD: tl.constexpr):
    """``correction2``: 1 - beta2^t; ``speed``: lr / (1 - beta1^t)."""
    old = mask & ~new
    keep0 = tl.load(record + KEEP_AT, mask=old, other=1.0) * shrink
    keep1 = tl.load(record + KEEP_AT + 1, mask=old, other=1.0) * beta1
    keep2 = tl.load(record + KEEP_AT + 2, mask=old, other=1.0) * beta2
    weight0 = tl.load(record + WEIGHT_AT, mask=old, other=0.0) * shrink
    weight1 = tl.load(record + WEIGHT_AT + 1, mask=old, other=0.0) * shrink
    eps0 = tl.load(record + EPS_AT, mask=old, other=0.0)
    eps1 = tl.load(record + EPS_AT + 1, mask=old, other=0.0)
    least = tl.load(record + LEAST_AT, mask=old, other=0.0)
    origin = tl.load(record + ORIGIN_AT, mask=old, other=0.0)
    complete = tl.load(record + COMPLETE_AT, mask=old, other=0.0)
    going = complete == 0
    y = tl.sqrt(correction2 + tl.zeros_like(keep2))
    if not AMSGRAD:
        y = tl.sqrt(correction2 / keep2)
    origin = tl.where(going & (origin == 0), y, origin)
    w, by = tl.where(going, speed * keep1 * y, 0.0), tl.where(going, y - origin, 0.0)
    m0 = tl.load(record + MOMENTS_AT, mask=old, other=0.0) * shrink + w
    m1 = tl.load(record + MOMENTS_AT + 1, mask=old, other=0.0) * shrink + w * by
    m2 = tl.load(record + MOMENTS_AT + 2, mask=old, other=0.0) * shrink + w * by * by
    m3 = tl.load(record + MOMENTS_AT + 3, mask=old, other=0.0) * shrink + w * by * by * by
    m4 = tl.load(record + MOMENTS_AT + 4, mask=old, other=0.0) * shrink + w * by * by * by * by
    at0, at1, node0, node1, limit = _quadrature(m0, m1, m2, m3, m4, origin, eps)
    limit = tl.where((eps == 0) & (limit < SMALLEST), SMALLEST, limit)
    # Products would leave fp32's range, as with beta2 = 0: whatever moves goes step by step.
    kept = (at0 + at1 + node1 + y < LARGEST) & ((eps == 0) | (node0 > SMALLEST))
    # Later steps add nothing that fp32 would see.
    finished = ~kept | (keep1 * y < GONE * origin)
    tl.store(record + KEEP_AT, keep0, mask=mask)
    tl.store(record + KEEP_AT + 1, keep1, mask=mask)
    tl.store(record + KEEP_AT + 2, keep2, mask=mask)
    tl.store(record + WEIGHT_AT, tl.where(going, tl.where(kept, at0, 0.0), weight0), mask=mask)
    tl.store(record + WEIGHT_AT + 1, tl.where(going, tl.where(kept, at1, 0.0), weight1), mask=mask)
    tl.store(record + EPS_AT, tl.where(going, tl.where(kept, node0, 1.0), eps0), mask=mask)
    tl.store(record + EPS_AT + 1, tl.where(going, tl.where(kept, node1, 1.0), eps1), mask=mask)
    tl.store(record + LEAST_AT, tl.where(going, tl.where(kept, limit, float("inf")), least), mask=mask)
    tl.store(record + MOMENTS_AT, m0, mask=mask)
    tl.store(record + MOMENTS_AT + 1, m1, mask=mask)
    tl.store(record + MOMENTS_AT + 2, m2, mask=mask)
    tl.store(record + MOMENTS_AT + 3, m3, mask=mask)
    tl.store(record + MOMENTS_AT + 4, m4, mask=mask)
    tl.store(record + ORIGIN_AT, origin, mask=mask)
    tl.store(record + COMPLETE_AT, tl.where(going, finished.to(tl.float64), complete), mask=mask)


@triton.jit
def extend_sgd(record, new, mask, pp, pb, bp, bb):
    """One product more: p, b -> pp p + pb b, bp p + bb b."""
    old = mask & ~new
    p_of_p = tl.load(record + KEEP_AT, mask=old, other=1.0)
    p_of_b = tl.load(record + KEEP_AT + 1, mask=old, other=0.0)
    b_of_p = tl.load(record + KEEP_AT + 2, mask=old, other=0.0)
    b_of_b = tl.load(record + KEEP_AT + 3, mask=old, other=1.0)
    tl.store(record + KEEP_AT, pp * p_of_p + pb * b_of_p, mask=mask)
    tl.store(record + KEEP_AT + 1, pp * p_of_b + pb * b_of_b, mask=mask)
    tl.store(record + KEEP_AT + 2, bp * p_of_p + bb * b_of_p, mask=mask)
    tl.store(record + KEEP_AT + 3, bp * p_of_b + bb * b_of_b, mask=mask)
