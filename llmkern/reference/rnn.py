"""Recurrent layers: one layer, one direction, step by step.

With W = weight_ih, U = weight_hh, a = W x[t] + b_ih, r = U h + b_hh, and the rows of W and U in torch's gate order:

    rnn_tanh, rnn_relu   h' = f(a + r)
    lstm (i, f, g, o)    c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c'), each gate of a + r
    gru (r, z, n)        n = tanh(a_n + sigmoid(a_r + r_r) r_n);  z = sigmoid(a_z + r_z);  h' = (1 - z) n + z h

With weight_hr (P, H) the h of an lstm is projected: h' = weight_hr (sigmoid(o) tanh(c')).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def rnn_step(
    mode: str, a: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h', c') of one step; ``a`` (B, G*H) is the input's part, ``c`` is passed through by all but lstm."""
    r = linear(h, weight_hh, bias_hh)
    if mode == "lstm":
        i, f, g, o = (a + r).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if weight_hr is None else linear(h, weight_hr)), c
    if mode == "gru":
        (a_r, a_z, a_n), (r_r, r_z, r_n) = a.chunk(3, -1), r.chunk(3, -1)
        n = torch.tanh(a_n + (a_r + r_r).sigmoid() * r_n)
        z = (a_z + r_z).sigmoid()
        return (1 - z) * n + z * h, c
    if mode == "rnn_tanh":
        return (a + r).tanh(), c
    if mode == "rnn_relu":
        return (a + r).relu(), c
    raise ValueError(f"mode: got {mode!r}, expected lstm, gru, rnn_tanh or rnn_relu")


def rnn(
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, hy, cy) of a whole sequence.

    Args:
        x: (T, B, I); or packed, (total, I), with ``batch_sizes`` (T), int64, non-increasing.
        hx, cx: the first states (B, H), hx (B, P) with a projection; ``cx`` for lstm only.
        mode: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        reverse: time runs from the end of each sequence to its beginning; y[t] stays at its t.

    Returns:
        y (T, B, H) or (total, H), hy (B, H), cy (B, H), empty but for lstm; H is P with a projection. All of
        ``x``'s dtype; states are carried in fp32 (fp64 for fp64) inside the sequence.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w_ih, w_hh, b_ih, b_hh, w_hr = (
        None if w is None else w.to(wide) for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    )
    assert w_ih is not None
    assert w_hh is not None
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    steps = linear(x.to(wide), w_ih, b_ih).reshape(-1, w_ih.shape[0]).split(sizes)
    h = hx.to(wide)
    c = h.new_zeros((h.shape[0], 0)) if cx is None else cx.to(wide)
    outputs: list[Tensor] = []
    for a in reversed(steps) if reverse else steps:
        # Sequences that have ended, or in reverse not begun, keep their states.
        n = a.shape[0]
        new_h, new_c = rnn_step(mode, a, h[:n], c[:n], w_hh, b_hh, w_hr)
        outputs.append(new_h)
        h, c = (new_h, new_c) if n == h.shape[0] else (torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]]))
    if reverse:
        outputs.reverse()
    y = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return y.to(x.dtype), h.to(x.dtype), c.to(x.dtype)
