"""Recurrent layers: one layer, one direction, step by step.

With W = weight_ih, U = weight_hh, a = W x[t] + b_ih, r = U h + b_hh, and the rows of W and U in torch's gate order:

    rnn_tanh, rnn_relu   h' = f(a + r)
    lstm (i, f, g, o)    c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c'), each gate of a + r
    gru (r, z, n)        n = tanh(a_n + sigmoid(a_r + r_r) r_n);  z = sigmoid(a_z + r_z);  h' = (1 - z) n + z h
    slstm (i, f, z, o)   c' = sigmoid(f) c + exp(i) tanh(z);  n' = sigmoid(f) n + exp(i);  h' = sigmoid(o) c' / n'

slstm (Beck et al., xLSTM, 2024) keeps c and n times exp(-m), with m' = max(i, log sigmoid(f) + m), so that nothing
overflows; where n is 0 nothing is carried and m' = i. Its cell state is c, n and m, side by side.

With weight_hr (P, H) the h of an lstm is projected: h' = weight_hr (sigmoid(o) tanh(c')).

What torch does not have, in the order of its application:

    norms       a = norm(W x) + b_ih, r = norm(U h) + b_hh, each over all gates; lstm: h' = sigmoid(o) tanh(norm(c'))
                (Ba et al., 2016)
    heads       U of H / heads columns: head k of h acts on the units of head k of each gate, a block diagonal
    peephole    p (3, H): i += p[0] c, f += p[1] c, o += p[2] c', before their sigmoids (Gers and Schmidhuber, 2000)
    clip        h' = min(max(h', -clip), clip)
    zoneout     h' = m h + (1 - m) h', and c alike, m drawn with the probability of zoneout in training, zoneout itself
                otherwise (Krueger et al., 2016); the h' of a step is made of the c' before it is mixed
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid

from .._facts import GATES, accumulate_dtype
from .._groups import RNNInputs, RNNOptions
from ._random import drawn


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias)


def hidden_product(mode: str, h: Tensor, weight_hh: Tensor) -> Tensor:
    """U h (B, G*H), U a matrix or, with fewer columns than h has, the blocks of a diagonal."""
    columns = weight_hh.shape[1]
    if columns == h.shape[1]:
        return linear(h, weight_hh)
    gates, heads = GATES[mode], h.shape[1] // columns
    blocks = weight_hh.reshape(gates, heads, -1, columns)
    return torch.einsum("bkc,gkuc->bgku", h.reshape(-1, heads, columns), blocks).flatten(1)


def rnn_step(
    mode: str,
    a: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None = None,
    norms: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """(h', c') of one step; ``a`` (B, G*H) is the input's part, ``c`` is passed through by all but lstm. ``norms``: the
    weight of the norm of U h, and for lstm weight and bias of that of c."""
    r = hidden_product(mode, h, weight_hh)
    if norms:
        r = normalised(r, norms[0], bias_hh)
    elif bias_hh is not None:
        r = r + bias_hh
    if mode == "lstm":
        i, f, g, o = (a + r).chunk(4, -1)
        if peephole is not None:
            i, f = i + peephole[0] * c, f + peephole[1] * c
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        c_out = normalised(c, norms[1], norms[2]) if norms else c
        h = (o if peephole is None else o + peephole[2] * c).sigmoid() * c_out.tanh()
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
    if mode == "slstm":
        i, f, z, o = (a + r).chunk(4, -1)
        c, n, m = c.chunk(3, -1)
        carried, empty = logsigmoid(f) + m, n == 0
        m = torch.where(empty | (i >= carried), i, carried)
        stable_i, stable_f = (i - m).exp(), torch.where(empty, 0.0, (carried - m).where(~empty, 0.0).exp())
        c, n = stable_f * c + stable_i * z.tanh(), stable_f * n + stable_i
        return o.sigmoid() * c / n, torch.cat([c, n, m], -1)
    raise ValueError(f"mode: got {mode!r}, expected lstm, gru, rnn_tanh, rnn_relu or slstm")


def _zone(new: Tensor, old: Tensor, probability: float, seed: Tensor | None, step: int, B: int, salt: int) -> Tensor:
    if probability == 0:
        return new
    kept: Tensor | float = probability
    if seed is not None:
        index = torch.arange(new.numel(), device=new.device).view(new.shape) + step * B * new.shape[1]
        kept = drawn(probability, seed, index, salt).to(new.dtype)
    return kept * old + (1 - kept) * new


def rnn(inputs: RNNInputs, options: RNNOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, hy, cy, cells) of a whole sequence. A seed is drawn from in training; without one zoneout mixes states.
    ``reverse``: time runs from the end of each sequence to its beginning; y[t] stays at its t.

    Returns:
        y, shaped as x with H (P with a projection) in place of I, of ``x``'s dtype; hy and cy, of ``hx``'s, cy empty
        where there is no ``cx``; and c after every step, in fp32 (fp64 for fp64), as empty.
        States are carried in fp32 (fp64) inside the sequence.
    """
    x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms, batch_sizes, seed = inputs
    mode, reverse, batch_first, clip, zoneout, zoneout_cell = options
    wide = accumulate_dtype(x.dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr, peep, scales = (
        None if w is None else w.to(wide) for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms)
    )
    assert w_ih is not None
    assert w_hh is not None
    steps_first = x.transpose(0, 1) if batch_first else x
    step_norms: list[Tensor] = []
    product = linear(steps_first.to(wide), w_ih, b_ih if scales is None else None)
    if scales is not None:
        rows, H = w_ih.shape[0], (scales.shape[0] - 2 * w_ih.shape[0]) // 2
        norm_ih, *step_norms = scales.split([rows, rows, H, H] if H else [rows, rows])
        product = normalised(product, norm_ih, b_ih)
    # Not by the numbers of rows where they are all one: a graph may be made of this, and run with another batch.
    steps = product.unbind(0) if batch_sizes is None else product.split(batch_sizes.tolist())
    h = hx.to(wide)
    c = h.new_zeros((h.shape[0], 0)) if cx is None else cx.to(wide)
    B, outputs, cells = h.shape[0], [], []
    for step, a in enumerate(reversed(steps) if reverse else steps):
        # Sequences that have ended, or in reverse not begun, keep their states.
        n = a.shape[0]
        new_h, new_c = rnn_step(mode, a, h[:n], c[:n], w_hh, b_hh, w_hr, peep, step_norms)
        new_h = _zone(new_h.clamp(-clip, clip) if clip else new_h, h[:n], zoneout, seed, step, B, 0)
        new_c = _zone(new_c, c[:n], zoneout_cell, seed, step, B, 1)
        outputs.append(new_h)
        cells.append(new_c)
        h, c = (new_h, new_c) if n == B else (torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]]))

    def joined(columns: list[Tensor]) -> Tensor:
        columns = columns[::-1] if reverse else columns
        return torch.cat(columns) if batch_sizes is not None else torch.stack(columns, 1 if batch_first else 0)

    every_c = c.new_zeros(0) if cx is None else joined(cells)
    return joined(outputs).to(x.dtype), h.to(hx.dtype), c.to(hx.dtype), every_c
