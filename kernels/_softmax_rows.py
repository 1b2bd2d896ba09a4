"""A softmax and its losses row by row, in pieces: what the kernels of cross-entropy are made of.

With z = cap(scale * x), a row's loss is

    index y:          keep w[y] (lse - z[y]) + sum_c u[c] (lse - z[c]) + z_loss lse^2,   u = w rest
    probabilities t:                           sum_c u[c] (lse - z[c]) + z_loss lse^2,   u = w (t keep + rest)

with keep = 1 - label_smoothing, rest = label_smoothing / V. Everything that is asked of a row comes from its *state*, a
tuple that grows with the elements read so far (m is their maximum; base is m, or 0 where m is infinite):

    m, s = sum exp(z - base), total = sum u, weighted = sum u (z - base), moment = sum exp(z - base) (z - base),
    best: where the first maximum is, bad: where the first NaN is

States of disjoint parts of a row join to the state of both. What is not asked for (``SHARES``: u, ``ENTROPY``,
``ARGMAX``) stays a constant and costs nothing. A row of -inf keeps m = -inf and s = 0, one with +inf has s = inf, one
with NaN has s = NaN: so the three are told apart at the end, and no block of -inf makes a NaN on the way.

A state has one element a *lane*. Elements come in tiles (lanes, elements of a lane). A lane is a row; or all lanes are
of one row, and join at the end: then no maximum has to cross from one thread to another while the row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import LossOptions
from . import _faults
from ._launch import accumulator
from ._math import tanh

# No place in a row.
NOWHERE = tl.constexpr(2**31 - 1)
# 0 * -inf is NaN; where p is 0 this keeps p (z - m) at 0. exp of it is 0 in fp64 too.
LOWEST = tl.constexpr(-800.0)


@triton.jit
def convert_options(keep, rest, z_loss, softcap, scale, ACC: tl.constexpr):
    """The options, which come as fp64, in the type of sums."""
    return (
        tl.full((), keep, ACC), tl.full((), rest, ACC), tl.full((), z_loss, ACC), tl.full((), softcap, ACC),
        tl.full((), scale, ACC),
    )  # fmt: skip


@triton.jit
def read_logits(x_ptr, at, mask, softcap, scale, CAP: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr):
    """z at these places, -inf where not ``mask``."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy=POLICY).to(ACC)
    z = softcap * tanh(x * (scale / softcap)) if CAP else x * scale
    return tl.where(mask, z, float("-inf"))


@triton.jit
def read_shares(probabilities_ptr, weight_ptr, at, v, mask, keep, rest, ACC: tl.constexpr):
    """u at these places, 0 where not ``mask``."""
    u = tl.where(mask, rest, 0.0)
    if probabilities_ptr is not None:
        u = tl.where(mask, tl.load(probabilities_ptr + at, mask=mask, other=0.0).to(ACC) * keep + rest, 0.0)
    if weight_ptr is not None:
        u *= tl.load(weight_ptr + v, mask=mask, other=0.0).to(ACC)
    return u


@triton.jit
def read_target(target_ptr, weight_ptr, fault_ptr, row, inside, V, ignore_index, ACC: tl.constexpr):
    """The target (-1: none), whether the row counts, and its class weight w[y]."""
    w_y = tl.full(row.shape, 1.0, ACC)
    if target_ptr is None:
        y, counts = tl.full(row.shape, -1, tl.int64), inside
    else:
        y = tl.load(target_ptr + row, mask=inside, other=0)
        good = (y >= 0) & (y < V)
        counts = inside & (y != ignore_index)
        if fault_ptr is not None:
            _faults.report(counts & ~good, y, fault_ptr)
        counts = counts & good
        y = tl.where(counts, y, -1)
        if weight_ptr is not None:
            w_y = tl.load(weight_ptr + y, mask=counts, other=0.0).to(ACC)
    return y, counts, w_y


@triton.jit
def start(LANES: tl.constexpr, ACC: tl.constexpr):
    """The state of nothing."""
    zero, nowhere = tl.zeros((LANES,), ACC), tl.full((LANES,), NOWHERE, tl.int32)
    return tl.full((LANES,), float("-inf"), ACC), zero, zero, zero, zero, nowhere, nowhere


@triton.jit
def _base(m):
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _first(m, best, top, at):
    """Where the first maximum is, of m at ``best`` and of ``top`` at ``at``."""
    return tl.where(top > m, at, tl.where(top == m, tl.minimum(best, at), best))


@triton.jit
def accumulate(state, z, u, v, mask, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr):
    """The state (A) after a tile z (A, B) at places v; z is -inf and u is 0 where not ``mask``."""
    m, s, total, weighted, moment, best, bad = state
    top = tl.max(z, 1)
    new = tl.where(top > m, top, m)
    base = _base(new)
    below = z - base[:, None]
    p = tl.exp(below)
    # Not of m's base: that is 0 for -inf, and exp may overflow.
    factor, shift = tl.exp(m - base), _base(m) - base
    if ENTROPY:
        moment = factor * (moment + s * shift) + tl.sum(p * tl.maximum(below, LOWEST), 1)
    if SHARES:
        weighted += total * shift + tl.sum(u * tl.where(mask, below, 0.0), 1)
        total += tl.sum(u, 1)
    if ARGMAX:
        best = _first(m, best, top, tl.min(tl.where(z == top[:, None], v, NOWHERE), 1))
        bad = tl.minimum(bad, tl.min(tl.where(z != z, v, NOWHERE), 1))
    return new, s * factor + tl.sum(p, 1), total, weighted, moment, best, bad


@triton.jit
def read_on(
    state, x_ptr, probabilities_ptr, weight_ptr, at, at_t, v, mask, options,
    CAP: tl.constexpr, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, ACC: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """The state (A) after a tile (A, B) of logits at ``at``, their probabilities at ``at_t``, their classes v."""
    z = read_logits(x_ptr, at, mask, options[3], options[4], CAP, ACC, POLICY)
    u = 0.0
    if SHARES:
        u = read_shares(probabilities_ptr, weight_ptr, at_t, v, mask, options[0], options[1], ACC)
    return accumulate(state, z, u, v, mask, SHARES, ENTROPY, ARGMAX)


@triton.jit
def join(state, other, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr):
    """The state of what two states of the same shape have read, ``other`` the later part."""
    m, s, total, weighted, moment, best, bad = state
    m2, s2, total2, weighted2, moment2, best2, bad2 = other
    new = tl.where(m2 > m, m2, m)
    base = _base(new)
    factor, shift = tl.exp(m - base), _base(m) - base
    factor2, shift2 = tl.exp(m2 - base), _base(m2) - base
    if ENTROPY:
        moment = factor * (moment + s * shift) + factor2 * (moment2 + s2 * shift2)
    if SHARES:
        weighted += total * shift + (weighted2 + total2 * shift2)
        total += total2
    if ARGMAX:
        best = _first(m, best, m2, best2)
        bad = tl.minimum(bad, bad2)
    return new, s * factor + s2 * factor2, total, weighted, moment, best, bad


@triton.jit
def across(state, AXIS: tl.constexpr, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr):
    """The state of what all lanes along an axis have read; the axis stays, with one lane."""
    m, s, total, weighted, moment, best, bad = state
    top = tl.max(m, AXIS, keep_dims=True)
    base = _base(top)
    factor, shift = tl.exp(m - base), _base(m) - base
    moment = tl.sum(factor * (moment + s * shift), AXIS, keep_dims=True) if ENTROPY else tl.zeros_like(top)
    weighted = tl.sum(weighted + total * shift, AXIS, keep_dims=True) if SHARES else tl.zeros_like(top)
    total = tl.sum(total, AXIS, keep_dims=True) if SHARES else tl.zeros_like(top)
    best = tl.min(tl.where(m == top, best, NOWHERE), AXIS, keep_dims=True) if ARGMAX else tl.zeros_like(top)
    bad = tl.min(bad, AXIS, keep_dims=True) if ARGMAX else best
    return top, tl.sum(s * factor, AXIS, keep_dims=True), total, weighted, moment, best, bad


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
def finish(
    state, z_y, w_y, row, counts, inside, options,
    dloss_ptr, dlse_ptr, dentropy_ptr, loss_ptr, lse_ptr, entropy_ptr, argmax_ptr,
    CAP: tl.constexpr, HARD: tl.constexpr, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes a row's outputs; returns the factors of its gradient, for the cotangents that came:

        dz = s (softmax - moment (z - m)) - g u, with s = exp(z - m) p; dz[y] is ``at_y`` instead
        dt = g keep w (log_sum - (z - m))
    """  # fmt: skip
    m, s, total, weighted, moment, best, bad = state
    keep, rest, z_loss, softcap, scale = options
    own = keep * w_y if HARD else tl.zeros(row.shape, ACC)
    infinite = tl.abs(m) == float("inf")
    lse = tl.where(infinite & (s == s), m, m + tl.log(s))
    # A row of -inf, or with +inf, has no softmax: everything else is NaN, as torch has it.
    m = tl.where(infinite, float("nan"), m)
    log_sum, p = tl.log(s), 1.0 / s
    true_lse = m + log_sum
    loss = tl.where(z_loss == 0, 0.0, z_loss * true_lse * true_lse)
    if HARD:
        loss += own * (log_sum - (z_y - m))
    if SHARES:
        loss += total * log_sum - weighted
    entropy = log_sum - moment * p
    _write(loss_ptr, row, loss, counts, inside)
    _write(lse_ptr, row, lse, counts, inside)
    _write(entropy_ptr, row, entropy, counts, inside)
    if argmax_ptr is not None:
        place = tl.where(bad < NOWHERE, bad, best)
        tl.store(argmax_ptr + row, tl.where(counts, place, -1).to(tl.int64), mask=inside)
    g, g_entropy = _read(dloss_ptr, row, counts, ACC), _read(dentropy_ptr, row, counts, ACC)
    # Without the target's own share, whose part at the target is own (s - 1): exact where s is near 1.
    others = _read(dlse_ptr, row, counts, ACC)
    others += g * (total + tl.where(z_loss == 0, 0.0, 2 * z_loss * true_lse))
    if ENTROPY:
        others += tl.where(g_entropy == 0, 0.0, g_entropy * (log_sum - entropy))
    at_y = tl.zeros(row.shape, ACC)
    if HARD:
        s_y = tl.exp(z_y - m) * p
        at_y = s_y * (others - g_entropy * tl.maximum(z_y - m, LOWEST)) + g * own * (s_y - 1.0)
        if SHARES:
            at_y -= g * rest * w_y
        at_y *= _slope(z_y, softcap, scale, CAP)
    return m, p, log_sum, others + g * own, g, g_entropy, at_y


@triton.jit
def _slope(z, softcap, scale, CAP: tl.constexpr):
    """dz / dx."""
    t = z / softcap if CAP else 0.0
    return scale * (1.0 - t * t)


@triton.jit
def write_gradient(
    dx_ptr, dprobabilities_ptr, weight_ptr, at, at_t, v, y, z, u, factors, counts, inside, mask, options,
    CAP: tl.constexpr, HARD: tl.constexpr, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a tile (A, B); 0 for rows that do not count."""
    m, p, log_sum, softmax, g, g_entropy, at_y = factors
    keep, _, _, softcap, scale = options
    below = z - m[:, None]
    if dprobabilities_ptr is not None:
        dt = (g * keep)[:, None] * (log_sum[:, None] - below)
        if weight_ptr is not None:
            dt *= tl.load(weight_ptr + v, mask=mask, other=0.0).to(ACC)
        tl.store(dprobabilities_ptr + at_t, dt.to(dprobabilities_ptr.dtype.element_ty), mask=inside)
    if dx_ptr is not None:
        dx = tl.exp(below) * p[:, None]
        if ENTROPY:
            dx *= softmax[:, None] - g_entropy[:, None] * tl.maximum(below, LOWEST)
        else:
            dx *= softmax[:, None]
        if SHARES:
            dx -= g[:, None] * u
        dx *= _slope(z, softcap, scale, CAP)
        if HARD:
            dx = tl.where(v == y[:, None], at_y[:, None], dx)
        dx = tl.where(counts[:, None], dx, 0.0)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def read_again(
    dx_ptr, dprobabilities_ptr, x_ptr, probabilities_ptr, weight_ptr, at, at_t, v, y, factors, counts, inside, mask,
    options, CAP: tl.constexpr, HARD: tl.constexpr, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads a tile for the last time and writes its gradients."""
    z = read_logits(x_ptr, at, mask, options[3], options[4], CAP, ACC, "evict_first")
    u = 0.0
    if SHARES:
        u = read_shares(probabilities_ptr, weight_ptr, at_t, v, mask, options[0], options[1], ACC)
    write_gradient(
        dx_ptr, dprobabilities_ptr, weight_ptr, at, at_t, v, y, z, u, factors, counts, inside, mask, options,
        CAP, HARD, SHARES, ENTROPY, ACC,
    )  # fmt: skip


class Loss(NamedTuple):
    """What the rows of a call share: ``target`` indices (int64) or probabilities, and the options of the ops."""

    target: Tensor
    weight: Tensor | None
    V: int
    options: LossOptions

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def indices(self) -> Tensor | None:
        return None if self.soft else self.target

    @property
    def probabilities(self) -> Tensor | None:
        return self.target if self.soft else None

    @property
    def shares(self) -> bool:
        """Whether classes other than the target count for something."""
        return self.soft or self.options.label_smoothing != 0

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
        return cls(
            loss, lse, torch.empty_like(loss) if entropy else None,
            like.new_empty(shape, dtype=torch.int64) if argmax else None,
        )  # fmt: skip

    def filled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ops return them: what is not wanted is empty."""
        loss, lse, entropy, argmax = self
        assert loss is not None
        assert lse is not None
        nothing = loss.new_empty(0)
        return (
            loss, lse, nothing if entropy is None else entropy,
            loss.new_empty(0, dtype=torch.int64) if argmax is None else argmax,
        )  # fmt: skip


class Cotangents(NamedTuple):
    """Per row, in the type of sums; None: none came."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
