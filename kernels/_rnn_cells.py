"""The cells of recurrent layers, as functions of tiles (sequences, units) in registers.

A state is h, and of some cells c, n and m; a cell passes through what it has not, and the compiler drops it. Formulas
and the order of gates are those of ``llmkern.reference.rnn``; what is saved for the backward is what native code saves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _random
from ._math import sigmoid, tanh


@triton.jit
def _log_sigmoid(x):
    """log(1 + e) is log(u) e / (u - 1) for u = 1 + e as it was rounded, and e where u is 1."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 0, x, 0.0) - log


@triton.jit
def zone(new, old, share, limit, seed_low, seed_high, index, salt: tl.constexpr):
    """``new`` and ``old`` mixed by zoneout: each element drawn where there is a ``limit``, else all in proportion."""
    kept = kept_of(new, share, limit, seed_low, seed_high, index, salt)
    return kept * old + (1.0 - kept) * new


@triton.jit
def kept_of(like, share, limit, seed_low, seed_high, index, salt: tl.constexpr):
    """How much of the former state zoneout keeps, of each element."""
    if limit is not None:
        bits = _random.random_bits(seed_low, seed_high, index, salt)
        kept = tl.where(bits.to(tl.int64) < limit, 1.0, 0.0).to(like.dtype)
    else:
        kept = tl.zeros_like(like) + share
    return kept


@triton.jit
def clamp(x, bound):
    """Within [-bound, bound], or NaN."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def cell_forward(r0, r1, r2, r3, h, c, n, m, p0, p1, p2, MODE: tl.constexpr):
    """h', c', n', m' and up to five numbers for the backward. ``r`` are the sums of the gates, of gru's n two (of x, of
    h); ``p`` the peepholes, or none."""
    s0, s1, s2, s3, s4 = r0, r1, r2, r3, r0
    if MODE == "lstm":
        before = c
        i, f, o = r0, r1, r3
        if p0 is not None:
            i += p0 * before
            f += p1 * before
        s0, s1, s2 = sigmoid(i), sigmoid(f), tanh(r2)
        c = s1 * before + s0 * s2
        if p0 is not None:
            o += p2 * c
        s3 = sigmoid(o)
        h = s3 * tanh(c)
    elif MODE == "gru":
        s0, s1, s3 = sigmoid(r0), sigmoid(r1), r3
        s2 = tanh(r2 + s0 * r3)
        h = s2 + s1 * (h - s2)
    elif MODE == "slstm":
        i, f = r0, r1
        s2, s3, s4 = tanh(r2), sigmoid(r3), sigmoid(f)
        # Nothing is carried from a state of nothing, whatever its m.
        carried, empty = _log_sigmoid(f) + m, n == 0
        m = tl.where(empty | (i >= carried), i, carried)
        s0 = tl.exp(i - m)
        kept = tl.where(empty, 0.0, tl.exp(tl.where(empty, 0.0, carried - m)))
        c, n = kept * c + s0 * s2, kept * n + s0
        # With a minus where m follows it, which a backward must know better than rounding tells.
        s1 = tl.where(m == i, kept, -kept)
        h = s3 * c / n
    else:
        h = tanh(r0) if MODE == "rnn_tanh" else tl.where(r0 < 0, 0.0, r0)
        s0 = h
    return h, c, n, m, s0, s1, s2, s3, s4


@triton.jit
def within(x, bound, d):
    """The gradient before a clip to ``bound`` (none: as it is), from that after it."""
    return d if bound is None else tl.where((x >= -bound) & (x <= bound), d, 0.0)


@triton.jit
def cell_backward(
    dout, dc, dn, dm, s0, s1, s2, s3, s4, h_before, c_before, n_before, c, n, zoned, p0, p1, p2, clip,
    MODE: tl.constexpr,
):  # fmt: skip
    """Gradients of what came before: dh (what passes by the gates), dc, dn, dm; then of the gates, in the order of
    dgates' columns. ``dout`` is that of h', ``dc``, ``dn`` and ``dm`` those of the new cell states, c and n these;
    ``zoned`` the share of c that was kept, or none."""
    d0, d1, d2, d3, dh = dout, dout, dout, dout, tl.zeros_like(dout)
    if MODE == "lstm":
        passed = tl.zeros_like(dout)
        if zoned is not None:
            # The c that h was made of is older than zoneout's.
            c = s1 * c_before + s0 * s2
            passed = zoned * dc
            dc = (1.0 - zoned) * dc
        squashed = tanh(c)
        dout = within(s3 * squashed, clip, dout)
        d3 = dout * squashed * s3 * (1.0 - s3)
        dc += dout * s3 * (1.0 - squashed * squashed)
        if p0 is not None:
            dc += d3 * p2
        d0, d1, d2 = dc * s2 * s0 * (1.0 - s0), dc * c_before * s1 * (1.0 - s1), dc * s0 * (1.0 - s2 * s2)
        dc = passed + dc * s1
        if p0 is not None:
            dc += d0 * p0 + d1 * p1
    elif MODE == "gru":
        dout = within(s2 + s1 * (h_before - s2), clip, dout)
        d3 = dout * (1.0 - s1) * (1.0 - s2 * s2)
        d0, d1 = d3 * s0, d3 * s3 * s0 * (1.0 - s0)
        d2 = dout * (h_before - s2) * s1 * (1.0 - s1)
        dh = dout * s1
    elif MODE == "slstm":
        kept, ratio = tl.abs(s1), c / n
        dout = within(s3 * ratio, clip, dout)
        dratio = dout * s3 / n
        dc += dratio
        dn -= dratio * ratio
        di, df = (dc * s2 + dn) * s0, (dc * c_before + dn * n_before) * kept
        # m is the larger of two numbers.
        dm -= di + df
        of_i = tl.where(s1 < 0, 0.0, dm)
        di += of_i
        df += dm - of_i
        d0, d1, d2, d3 = di, df * (1.0 - s4), dc * s0 * (1.0 - s2 * s2), dout * ratio * s3 * (1.0 - s3)
        dc, dn, dm = dc * kept, dn * kept, df
    else:
        dout = within(s0, clip, dout)
        d0 = dout * (1.0 - s0 * s0) if MODE == "rnn_tanh" else tl.where(s0 <= 0, 0.0, dout)
    return dh, dc, dn, dm, d0, d1, d2, d3
