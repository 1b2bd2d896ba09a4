"""A softmax and its losses row by row, in parts: what the kernels of cross-entropy are made of.

With z = cap(scale * x), a row's loss is

    index y:          keep w[y] (lse - z[y]) + sum_c u[c] (lse - z[c]) + z_loss lse^2,   u = w rest
    probabilities t:                           sum_c u[c] (lse - z[c]) + z_loss lse^2,   u = w (t keep + rest)

with keep = 1 - label_smoothing, rest = label_smoothing / V. Everything that is asked of a row comes from its
:class:`SoftmaxState`, which grows with the elements read so far. States of disjoint parts of a row join to the state of
both. What is not asked for (``SPREAD``: u, ``ENTROPY``, ``ARGMAX``) stays a constant and costs nothing. A row of -inf
keeps m = -inf and s = 0, one with +inf has s = inf, one with NaN has s = NaN: so the three are told apart at the end,
and no block of -inf makes a NaN on the way.

Elements come in blocks (states, elements of a state). A state is that of a row; or all states are of one row, and join
at the end: then no maximum has to cross from one thread to another while the row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import LossOptions
from . import _faults
from ._launch import acc_type, accumulator
from ._math import tanh

# No place in a row.
NOWHERE = tl.constexpr(2**31 - 1)
# 0 * -inf is NaN; where p is 0 this keeps p (z - m) at 0. exp of it is 0 in fp64 too.
LOWEST = tl.constexpr(-800.0)


class SoftmaxState(NamedTuple):
    """Of elements z of a row; base is m, or 0 where m is infinite."""

    m: Any  # their maximum
    s: Any  # sum exp(z - base)
    total: Any  # sum u
    weighted: Any  # sum u (z - base)
    moment: Any  # sum exp(z - base) (z - base)
    best: Any  # where the first maximum is
    bad: Any  # where the first NaN is


class Factors(NamedTuple):
    """Of a row's gradient, for the cotangents that came:

    dz = softmax_factor softmax - g_entropy softmax (z - m) - g u, with softmax = exp(z - m) p; dz[y] is ``at_y``
    dt = g keep w (log_sum - (z - m))
    """

    m: Any
    p: Any
    log_sum: Any
    softmax_factor: Any
    g: Any
    g_entropy: Any
    at_y: Any


class LossShape(NamedTuple):
    """What kernels are compiled for."""

    CAP: bool
    HARD: bool  # whether targets are indices
    SPREAD: bool  # whether classes other than the target count for something
    ENTROPY: bool
    ARGMAX: bool
    ACC: tl.dtype


class Options(NamedTuple):
    """Those of the op, in the type of sums."""

    keep: Any
    rest: Any
    z_loss: Any
    softcap: Any
    scale: Any


class Targets(NamedTuple):
    """What rows are compared with: indices, or probabilities."""

    indices: Tensor | None
    probabilities: Tensor | None
    weight: Tensor | None
    fault: Tensor | None


class LogitGradients(NamedTuple):
    """Of the logits and of probabilities, None where not wanted; nothing is written if ``blocked`` is not 0."""

    x: Tensor | None
    probabilities: Tensor | None
    blocked: Tensor | None


@triton.jit
def convert_options(keep, rest, z_loss, softcap, scale, ACC: tl.constexpr):
    """The options, which come as fp64."""
    keep, rest, z_loss = tl.full((), keep, ACC), tl.full((), rest, ACC), tl.full((), z_loss, ACC)
    return Options(keep, rest, z_loss, tl.full((), softcap, ACC), tl.full((), scale, ACC))


@triton.jit
def read_logits(x_ptr, at, mask, options, S, POLICY: tl.constexpr):
    """z at these places, -inf where not ``mask``."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy=POLICY).to(S.ACC)
    z = options.softcap * tanh(x * (options.scale / options.softcap)) if S.CAP else x * options.scale
    return tl.where(mask, z, float("-inf"))


@triton.jit
def read_spread(targets, at, v, mask, options, S):
    """u at these places, 0 where not ``mask``."""
    u = 0.0
    if S.SPREAD:
        u = tl.where(mask, options.rest, 0.0)
        if targets.probabilities is not None:
            t = tl.load(targets.probabilities + at, mask=mask, other=0.0).to(S.ACC)
            u = tl.where(mask, t * options.keep + options.rest, 0.0)
        if targets.weight is not None:
            u *= tl.load(targets.weight + v, mask=mask, other=0.0).to(S.ACC)
    return u


@triton.jit
def read_target(targets, row, inside, V, ignore_index, S):
    """The target (-1: none), whether the row counts, and its class weight w[y]."""
    w_y = tl.full(row.shape, 1.0, S.ACC)
    if targets.indices is None:
        y, counts = tl.full(row.shape, -1, tl.int64), inside
    else:
        y = tl.load(targets.indices + row, mask=inside, other=0)
        good = (y >= 0) & (y < V)
        counts = inside & (y != ignore_index)
        if targets.fault is not None:
            _faults.report(counts & ~good, y, targets.fault)
        counts = counts & good
        y = tl.where(counts, y, -1)
        if targets.weight is not None:
            w_y = tl.load(targets.weight + y, mask=counts, other=0.0).to(S.ACC)
    return y, counts, w_y


@triton.jit
def start(STATES: tl.constexpr, ACC: tl.constexpr):
    """The states of nothing."""
    zero, nowhere = tl.zeros((STATES,), ACC), tl.full((STATES,), NOWHERE, tl.int32)
    return SoftmaxState(tl.full((STATES,), float("-inf"), ACC), zero, zero, zero, zero, nowhere, nowhere)


@triton.jit
def _base(m):
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _first(m, best, top, at):
    """Where the first maximum is, of m at ``best`` and of ``top`` at ``at``."""
    return tl.where(top > m, at, tl.where(top == m, tl.minimum(best, at), best))


@triton.jit
def accumulate(state, z, u, v, mask, S):
    """The state (A) after a block z (A, B) at places v; z is -inf and u is 0 where not ``mask``."""
    m, s, total, weighted, moment, best, bad = state
    top = tl.max(z, 1)
    new = tl.where(top > m, top, m)
    base = _base(new)
    below = z - base[:, None]
    p = tl.exp(below)
    # Not of m's base: that is 0 for -inf, and exp may overflow.
    factor, shift = tl.exp(m - base), _base(m) - base
    if S.ENTROPY:
        moment = factor * (moment + s * shift) + tl.sum(p * tl.maximum(below, LOWEST), 1)
    if S.SPREAD:
        weighted += total * shift + tl.sum(u * tl.where(mask, below, 0.0), 1)
        total += tl.sum(u, 1)
    if S.ARGMAX:
        best = _first(m, best, top, tl.min(tl.where(z == top[:, None], v, NOWHERE), 1))
        bad = tl.minimum(bad, tl.min(tl.where(z != z, v, NOWHERE), 1))
    return SoftmaxState(new, s * factor + tl.sum(p, 1), total, weighted, moment, best, bad)


@triton.jit
def read_on(state, x_ptr, targets, at, at_t, v, mask, options, S, POLICY: tl.constexpr):
    """The state (A) after a block (A, B) of logits at ``at``, their probabilities at ``at_t``, their classes v."""
    z = read_logits(x_ptr, at, mask, options, S, POLICY)
    return accumulate(state, z, read_spread(targets, at_t, v, mask, options, S), v, mask, S)


@triton.jit
def join(state, other, S):
    """The state of what two states of the same shape have read, ``other`` the later part."""
    m, s, total, weighted, moment, best, bad = state
    m2, s2, total2, weighted2, moment2, best2, bad2 = other
    new = tl.where(m2 > m, m2, m)
    base = _base(new)
    factor, shift = tl.exp(m - base), _base(m) - base
    factor2, shift2 = tl.exp(m2 - base), _base(m2) - base
    if S.ENTROPY:
        moment = factor * (moment + s * shift) + factor2 * (moment2 + s2 * shift2)
    if S.SPREAD:
        weighted += total * shift + (weighted2 + total2 * shift2)
        total += total2
    if S.ARGMAX:
        best = _first(m, best, m2, best2)
        bad = tl.minimum(bad, bad2)
    return SoftmaxState(new, s * factor + s2 * factor2, total, weighted, moment, best, bad)


@triton.jit
def across(state, AXIS: tl.constexpr, S):
    """The state of what all states along an axis have read; the axis stays, with one state."""
    m, s, total, weighted, moment, best, bad = state
    top = tl.max(m, AXIS, keep_dims=True)
    base = _base(top)
    factor, shift = tl.exp(m - base), _base(m) - base
    moment = tl.sum(factor * (moment + s * shift), AXIS, keep_dims=True) if S.ENTROPY else tl.zeros_like(top)
    weighted = tl.sum(weighted + total * shift, AXIS, keep_dims=True) if S.SPREAD else tl.zeros_like(top)
    total = tl.sum(total, AXIS, keep_dims=True) if S.SPREAD else tl.zeros_like(top)
    best = tl.min(tl.where(m == top, best, NOWHERE), AXIS, keep_dims=True) if S.ARGMAX else tl.zeros_like(top)
    bad = tl.min(bad, AXIS, keep_dims=True) if S.ARGMAX else best
    s = tl.sum(s * factor, AXIS, keep_dims=True)
    return SoftmaxState(top, s, total, weighted, moment, best, bad)


@triton.jit
def _read(row_ptr, row, counts, ACC: tl.constexpr):
    value = tl.zeros(row.shape, ACC)
    if row_ptr is not None:
        value = tl.load(row_ptr + row, mask=counts, other=0.0)
    return value


@triton.jit
def _write(row_ptr, row, value, counts, inside):
    if row_ptr is not None:
        tl.store(row_ptr + row, tl.where(counts, value, 0.0), mask=inside)


@triton.jit
def finish(state, z_y, w_y, row, counts, inside, options, cotangents, outputs, S):
    """Writes a row's outputs; returns the factors of its gradient."""
    m, s, total, weighted, moment, best, bad = state
    keep, rest, z_loss, softcap, scale = options
    own = keep * w_y if S.HARD else tl.zeros(row.shape, S.ACC)
    infinite = tl.abs(m) == float("inf")
    lse = tl.where(infinite & (s == s), m, m + tl.log(s))
    # A row of -inf, or with +inf, has no softmax: everything else is NaN, as torch has it.
    m = tl.where(infinite, float("nan"), m)
    log_sum, p = tl.log(s), 1.0 / s
    true_lse = m + log_sum
    loss = tl.where(z_loss == 0, 0.0, z_loss * true_lse * true_lse)
    if S.HARD:
        loss += own * (log_sum - (z_y - m))
    if S.SPREAD:
        loss += total * log_sum - weighted
    entropy = log_sum - moment * p
    _write(outputs.loss, row, loss, counts, inside)
    _write(outputs.lse, row, lse, counts, inside)
    _write(outputs.entropy, row, entropy, counts, inside)
    if outputs.argmax is not None:
        place = tl.where(bad < NOWHERE, bad, best)
        tl.store(outputs.argmax + row, tl.where(counts, place, -1).to(tl.int64), mask=inside)
    g, g_entropy = _read(cotangents.loss, row, counts, S.ACC), _read(cotangents.entropy, row, counts, S.ACC)
    # Without what the target counts for, which gives own (s - 1) at the target: exact where s is near 1.
    others = _read(cotangents.lse, row, counts, S.ACC)
    others += g * (total + tl.where(z_loss == 0, 0.0, 2 * z_loss * true_lse))
    if S.ENTROPY:
        others += tl.where(g_entropy == 0, 0.0, g_entropy * (log_sum - entropy))
    at_y = tl.zeros(row.shape, S.ACC)
    if S.HARD:
        s_y = tl.exp(z_y - m) * p
        at_y = s_y * (others - g_entropy * tl.maximum(z_y - m, LOWEST)) + g * own * (s_y - 1.0)
        if S.SPREAD:
            at_y -= g * rest * w_y
        at_y *= _slope(z_y, softcap, scale, S.CAP)
    return Factors(m, p, log_sum, others + g * own, g, g_entropy, at_y)


@triton.jit
def _slope(z, softcap, scale, CAP: tl.constexpr):
    """dz / dx."""
    t = z / softcap if CAP else 0.0
    return scale * (1.0 - t * t)


@triton.jit
def write_gradient(gradients, targets, at, at_t, v, y, z, u, factors, counts, inside, mask, options, S):
    """Writes the gradients of a block (A, B); 0 for rows that do not count."""
    m, p, log_sum, softmax_factor, g, g_entropy, at_y = factors
    below = z - m[:, None]
    if gradients.probabilities is not None:
        dt = (g * options.keep)[:, None] * (log_sum[:, None] - below)
        if targets.weight is not None:
            dt *= tl.load(targets.weight + v, mask=mask, other=0.0).to(S.ACC)
        tl.store(gradients.probabilities + at_t, dt.to(gradients.probabilities.dtype.element_ty), mask=inside)
    if gradients.x is not None:
        dx = tl.exp(below) * p[:, None]
        if S.ENTROPY:
            dx *= softmax_factor[:, None] - g_entropy[:, None] * tl.maximum(below, LOWEST)
        else:
            dx *= softmax_factor[:, None]
        if S.SPREAD:
            dx -= g[:, None] * u
        dx *= _slope(z, options.softcap, options.scale, S.CAP)
        if S.HARD:
            dx = tl.where(v == y[:, None], at_y[:, None], dx)
        dx = tl.where(counts[:, None], dx, 0.0)
        tl.store(gradients.x + at, dx.to(gradients.x.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def read_again(x_ptr, gradients, targets, at, at_t, v, y, factors, counts, inside, mask, options, S):
    """Reads a block for the last time and writes its gradients."""
    z = read_logits(x_ptr, at, mask, options, S, "evict_first")
    u = read_spread(targets, at_t, v, mask, options, S)
    write_gradient(gradients, targets, at, at_t, v, y, z, u, factors, counts, inside, mask, options, S)


class Loss(NamedTuple):
    """What the rows of a call share: ``target`` indices (int64) or probabilities, and the options of the ops."""

    target: Tensor
    weight: Tensor | None
    V: int
    options: LossOptions

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    def targets(self, fault: Tensor | None) -> Targets:
        indices, probabilities = (None, self.target) if self.soft else (self.target, None)
        return Targets(indices, probabilities, self.weight, fault)

    @property
    def spread(self) -> bool:
        """Whether classes other than the target count for something."""
        return self.soft or self.options.label_smoothing != 0

    def shape(self, entropy: bool, argmax: bool, like: Tensor) -> LossShape:
        return LossShape(self.options.softcap != 0, not self.soft, self.spread, entropy, argmax, acc_type(like))

    @property
    def numbers(self) -> tuple[float, ...]:
        """keep, rest, z_loss, softcap, scale."""
        _, smoothing, *others = self.options
        return (1 - smoothing, smoothing / self.V, *others)


class Outputs(NamedTuple):
    """Per row, in the type of sums (argmax in int64); None where not wanted."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, shape: Sequence[int], entropy: bool, argmax: bool) -> Outputs:
        loss, lse = (like.new_empty(shape, dtype=accumulator(like)) for _ in range(2))
        places = like.new_empty(shape, dtype=torch.int64) if argmax else None
        return cls(loss, lse, torch.empty_like(loss) if entropy else None, places)

    def filled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ops return them: what is not wanted is empty."""
        loss, lse, entropy, argmax = self
        assert loss is not None
        assert lse is not None
        nothing = loss.new_empty(0)
        places = loss.new_empty(0, dtype=torch.int64) if argmax is None else argmax
        return loss, lse, nothing if entropy is None else entropy, places


class Cotangents(NamedTuple):
    """Per row, in the type of sums; None: none came."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
