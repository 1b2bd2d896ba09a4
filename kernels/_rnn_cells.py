"""The cells of recurrent layers, as functions of blocks (sequences, units) in registers.

A state is h, and as many cell states as the cell has: c, or c, n and m, or none. Formulas and the order of gates are
those of ``llmkern.reference.rnn``; what is saved for the backward is what native code saves. What an option adds
(peepholes, a clip, a probability of zoneout) is an empty tuple where it is not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import _random
from ._math import sigmoid, tanh


class State(NamedTuple):
    """A state, or the gradient at one."""

    h: Any
    cells: Any  # a tuple


@triton.jit
def _log_sigmoid(x):
    """log(1 + e) is log(u) e / (u - 1) for u = 1 + e as it was rounded, and e where u is 1."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 0, x, 0.0) - log


@triton.jit
def kept_by_zoneout(like, zoneout, threshold, seed, index, salt: tl.constexpr):
    """How much of the former state zoneout keeps: of each element all or nothing where there is a ``threshold`` for its
    random bits, else as much as the probability says."""
    if threshold is not None:
        bits = _random.random_bits(seed, index, salt)
        kept = tl.where(bits.to(tl.int64) < threshold, 1.0, 0.0).to(like.dtype)
    else:
        kept = tl.zeros_like(like) + zoneout[0]
    return kept


@triton.jit
def clamp(x, bound):
    """Within [-bound, bound], or NaN."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def _lstm_forward(sums, cells, peephole):
    i, f, g, o = sums
    before = cells[0]
    if len(peephole) > 0:
        i += peephole[0] * before
        f += peephole[1] * before
    i, f, g = sigmoid(i), sigmoid(f), tanh(g)
    c = f * before + i * g
    if len(peephole) > 0:
        o += peephole[2] * c
    o = sigmoid(o)
    return State(o * tanh(c), (c,)), (i, f, g, o)


@triton.jit
def _gru_forward(sums, h):
    """The sum of n is two: of x, and of h, which r multiplies."""
    r, z, of_h = sigmoid(sums[0]), sigmoid(sums[1]), sums[3]
    n = tanh(sums[2] + r * of_h)
    return State(n + z * (h - n), ()), (r, z, n, of_h)


@triton.jit
def _slstm_forward(sums, cells):
    i, f, g, o = sums
    c, n, m = cells
    g, o = tanh(g), sigmoid(o)
    # Nothing is carried from a state of nothing, whatever its m.
    carried, empty = _log_sigmoid(f) + m, n == 0
    new_m = tl.where(empty | (i >= carried), i, carried)
    stable_i = tl.exp(i - new_m)
    kept = tl.where(empty, 0.0, tl.exp(tl.where(empty, 0.0, carried - new_m)))
    c, n = kept * c + stable_i * g, kept * n + stable_i
    # With a minus where m follows it, which a backward must know better than rounding tells.
    signed_f = tl.where(new_m == i, kept, -kept)
    return State(o * c / n, (c, n, new_m)), (stable_i, signed_f, g, o, sigmoid(f))


@triton.jit
def cell_forward(sums, state, peephole, MODE: tl.constexpr):
    """The next state, and the numbers for the backward. ``sums`` are those of the gates, and a fourth of gru's."""
    if MODE == "lstm":
        new, saved = _lstm_forward(sums, state.cells, peephole)
    elif MODE == "gru":
        new, saved = _gru_forward(sums, state.h)
    elif MODE == "slstm":
        new, saved = _slstm_forward(sums, state.cells)
    else:
        h = tanh(sums[0]) if MODE == "rnn_tanh" else tl.where(sums[0] < 0, 0.0, sums[0])
        new, saved = State(h, ()), (h,)
    return new, saved


@triton.jit
def _clip_backward(x, clip, dx):
    """The gradient before a clip of ``x``, from that after it."""
    if len(clip) > 0:
        dx = tl.where((x >= -clip[0]) & (x <= clip[0]), dx, 0.0)
    return dx


@triton.jit
def _lstm_backward(d, saved, c_before, c, kept_c, peephole, clip):
    i, f, g, o = saved
    dc, dkept = d.cells[0], tl.zeros_like(d.h)
    if len(kept_c) > 0:
        # The c that h was made of is older than zoneout's.
        c = f * c_before + i * g
        dkept = kept_c[0] * dc
        dc = (1.0 - kept_c[0]) * dc
    tanh_c = tanh(c)
    dh = _clip_backward(o * tanh_c, clip, d.h)
    do = dh * tanh_c * o * (1.0 - o)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    if len(peephole) > 0:
        dc += do * peephole[2]
    di, df, dg = dc * g * i * (1.0 - i), dc * c_before * f * (1.0 - f), dc * i * (1.0 - g * g)
    dc = dkept + dc * f
    if len(peephole) > 0:
        dc += di * peephole[0] + df * peephole[1]
    return State(tl.zeros_like(d.h), (dc,)), (di, df, dg, do)


@triton.jit
def _gru_backward(d, saved, h_before, clip):
    r, z, n, of_h = saved
    dh = _clip_backward(n + z * (h_before - n), clip, d.h)
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr, dz = dn * of_h * r * (1.0 - r), dh * (h_before - n) * z * (1.0 - z)
    return State(dh * z, ()), (dn * r, dr, dz, dn)


@triton.jit
def _slstm_backward(d, saved, c_before, n_before, c, n, clip):
    i, signed_f, g, o, sigmoid_f = saved
    dc, dn, dm = d.cells
    f, ratio = tl.abs(signed_f), c / n
    dh = _clip_backward(o * ratio, clip, d.h)
    dratio = dh * o / n
    dc += dratio
    dn -= dratio * ratio
    di, df = (dc * g + dn) * i, (dc * c_before + dn * n_before) * f
    # m is the larger of two numbers.
    dm -= di + df
    dm_of_i = tl.where(signed_f < 0, 0.0, dm)
    di += dm_of_i
    df += dm - dm_of_i
    dgates = di, df * (1.0 - sigmoid_f), dc * i * (1.0 - g * g), dh * ratio * o * (1.0 - o)
    return State(tl.zeros_like(d.h), (dc * f, dn * f, df)), dgates


@triton.jit
def cell_backward(d, saved, before, cells, kept_c, peephole, clip, MODE: tl.constexpr):
    """The gradient at the state before (of h, what does not come by the gates), and those of the gates in the order of
    dgates' columns. ``d`` is that at the new state; ``before`` and ``cells`` are what the cell needs of the state
    before (h of gru, c of lstm, c and n of slstm) and of the cells after; ``kept_c`` how much of c zoneout kept."""
    if MODE == "lstm":
        d_before, dgates = _lstm_backward(d, saved, before[0], cells[0], kept_c, peephole, clip)
    elif MODE == "gru":
        d_before, dgates = _gru_backward(d, saved, before[0], clip)
    elif MODE == "slstm":
        d_before, dgates = _slstm_backward(d, saved, before[0], before[1], cells[0], cells[1], clip)
    else:
        h = saved[0]
        dh = _clip_backward(h, clip, d.h)
        dh = dh * (1.0 - h * h) if MODE == "rnn_tanh" else tl.where(h <= 0, 0.0, dh)
        d_before, dgates = State(tl.zeros_like(d.h), ()), (dh,)
    return d_before, dgates
