"""Recurrent layers, backward: time from its end, then products over all of time.

In the loop stands what no batching takes out of it, dh = dgates W_hh, by the same three ways as in the forward; tanh(c)
is computed again. Of its results only dgates are kept, in the dtype of x: dx = dgates W_ih, dW_ih = dgates^T x, dW_hh =
dgates^T h and the sums for biases follow as one product each, so that no sum over time is taken in steps.

Traffic of a token: dy, gates, c twice, and dgates once; then x, h of the step before and dgates as the products read
them. Each program reads its columns of W_hh and its sequences' dgates of the step after in every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import RNNCotangents, RNNInputs, RNNOptions, RNNSaved
from ._launch import accumulator, ceil_div, launch
from ._rnn_cells import cell_backward, kept_of
from ._rnn_layer import (
    Layer,
    await_others,
    given,
    load_cells,
    load_row,
    publish,
    put,
    require,
    step_at,
    store_cells,
)

BLOCK = 1024


@triton.jit(do_not_specialize=["T", "B", "time_stride", "row_stride"])
def rnn_before_kernel(
    y_ptr, h0_ptr, offsets_ptr, before_ptr, T, B, time_stride, row_stride, H, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """h before the step of each token: program (s, j) has the j-th block of step s."""
    s, i = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, unit = i // H, i % H
    begin, rows = step_at(offsets_ptr, s, T, B, time_stride, REVERSE)
    earlier, rows_earlier = step_at(offsets_ptr, s - 1, T, B, time_stride, REVERSE)
    follows = b < tl.minimum(rows, rows_earlier)
    h = tl.load(y_ptr + (earlier + b * row_stride) * H + unit, mask=follows, other=0.0)
    h0 = tl.load(h0_ptr + i, mask=(b < rows) & ~follows, other=0.0)
    tl.store(before_ptr + (begin + b * row_stride) * H + unit, tl.where(follows, h, h0), mask=b < rows)


@triton.jit
def _through_gates(
    dgates_rows, rows_mask, weight_ptr, u, H: tl.constexpr, U: tl.constexpr, MODE: tl.constexpr, G: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dgates W_hh of units ``u`` of a head, whose weights begin at ``weight_ptr``."""
    total = tl.zeros((BLOCK_B, BLOCK_U), ACC)
    for first in tl.range(0, U, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        dgates, live = dgates_rows[:, None] + k[None, :], rows_mask[:, None] & (k < U)[None, :]
        weights, inside = weight_ptr + (k[:, None] * U + u[None, :]), (k < U)[:, None] & (u < U)[None, :]
        for g in tl.static_range(G):
            # Columns of gru: r dn, dr, dz, dn.
            column = (g + 1) % 3 if MODE == "gru" else g
            d = tl.load(dgates + column * H, mask=live, other=0.0)
            w = tl.load(weights + g * H * U, mask=inside, other=0.0)
            total = tl.dot(d, w, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _before(tokens, firsts, follows, here, ACC: tl.constexpr):
    """A state before a step: of the token before it, or the sequence's first."""
    token = tl.load(tokens, mask=here & follows, other=0.0).to(ACC)
    return tl.where(follows, token, tl.load(firsts, mask=here & ~follows, other=0.0).to(ACC))


@triton.jit
def _saved(gates_ptr, at, here, part: tl.constexpr, SAVED: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr):
    """One of the numbers that the forward saved; zeros of those that the cell has not."""
    if part < SAVED:
        value = tl.load(gates_ptr + at + part * H, mask=here, other=0.0).to(ACC)
    else:
        value = tl.zeros(here.shape, ACC)
    return value


@triton.jit(
    do_not_specialize=[
        *("T", "B", "time_stride", "row_stride", "seed_low", "seed_high", "limit_h", "limit_c", "first", "last"),
    ]
)
def rnn_backward_kernel(
    dy_ptr, dcells_ptr, weight_ptr, peephole_ptr, offsets_ptr, y_ptr, h0_ptr, gates_ptr, cells_ptr, c0_ptr, dgates_ptr,
    dh_ptr, dc_ptr, T, B, time_stride, row_stride, seed_low, seed_high, limit_h, limit_c, share_h_ptr,
    share_c_ptr, clip_ptr, counters_ptr, first, last, H: tl.constexpr, U: tl.constexpr, MODE: tl.constexpr,
    G: tl.constexpr, SAVED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Step i takes dh through the gates of step T - i, if there is one, and then makes dgates of step T - 1 - i."""
    chain = tl.program_id(0).to(tl.int64)
    head, b_first = chain % (H // U), chain // (H // U) * BLOCK_B
    b, u = b_first + tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    unit, mine = head * U + u, u < U
    own = (b < B)[:, None] & mine[None, :]
    if counters_ptr is not None:
        counters_ptr += chain
    C: tl.constexpr = 3 * H if MODE == "slstm" else H
    D: tl.constexpr = 4 * H if MODE == "gru" else G * H
    states, cell_states = b[:, None] * H + unit[None, :], b[:, None] * C + unit[None, :]
    dh = tl.load(dh_ptr + states, mask=own, other=0.0)
    dc, dn, dm = load_cells(dc_ptr, cell_states, own, dh, H, MODE)
    p0, p1, p2 = None, None, None
    if peephole_ptr is not None:
        p0 = load_row(peephole_ptr, unit, mine, 0, H, ACC)
        p1, p2 = load_row(peephole_ptr, unit, mine, 1, H, ACC), load_row(peephole_ptr, unit, mine, 2, H, ACC)
    # Not in a function of its own: none of Triton 3.6's returns None.
    share_h, share_c, clip = None, None, None
    if share_h_ptr is not None:
        share_h = tl.load(share_h_ptr)
    if share_c_ptr is not None:
        share_c = tl.load(share_c_ptr)
    if clip_ptr is not None:
        clip = tl.load(clip_ptr)
    done = first - first
    for i in tl.range(first, last, num_stages=1, disable_licm=PROGRAMS == 1):
        s = T - 1 - i
        after, rows_after = step_at(offsets_ptr, s + 1, T, B, time_stride, REVERSE)
        begin, rows = step_at(offsets_ptr, s, T, B, time_stride, REVERSE)
        if b_first < tl.maximum(rows, rows_after):
            earlier, rows_earlier = step_at(offsets_ptr, s - 1, T, B, time_stride, REVERSE)
            token, here = begin + b * row_stride, (b < rows)[:, None] & mine[None, :]
            follows = (b < rows_earlier)[:, None]
            at, cell_at = token[:, None] * H + unit[None, :], token[:, None] * C + unit[None, :]
            saved = token[:, None] * (SAVED * H) + unit[None, :]
            if SAVED > 0:
                s0 = _saved(gates_ptr, saved, here, 0, SAVED, H, ACC)
            else:
                # Of a plain Elman network y says all.
                s0 = _saved(y_ptr, at, here, 0, 1, H, ACC)
            s1, s2 = _saved(gates_ptr, saved, here, 1, SAVED, H, ACC), _saved(gates_ptr, saved, here, 2, SAVED, H, ACC)
            s3, s4 = _saved(gates_ptr, saved, here, 3, SAVED, H, ACC), _saved(gates_ptr, saved, here, 4, SAVED, H, ACC)
            dout = tl.load(dy_ptr + at, mask=here, other=0.0).to(ACC)
            h_before, c_before, n_before, c, n = s0, s0, s0, s0, s0
            earlier_rows = (earlier + b * row_stride)[:, None]
            if MODE == "gru":
                h_before = _before(y_ptr + earlier_rows * H + unit[None, :], h0_ptr + states, follows, here, ACC)
            if cells_ptr is not None:
                before = cells_ptr + earlier_rows * C + unit[None, :]
                c_before = _before(before, c0_ptr + cell_states, follows, here, ACC)
                c = tl.load(cells_ptr + cell_at, mask=here, other=0.0)
            if MODE == "slstm":
                n_before = _before(before + H, c0_ptr + cell_states + H, follows, here, ACC)
                n = tl.load(cells_ptr + cell_at + H, mask=here, other=1.0)
            if counters_ptr is not None:
                await_others(counters_ptr, done, PROGRAMS)
            # Nothing of sequences that have no step after this one.
            dgates_rows = dgates_ptr + (after + b * row_stride) * D + head * U
            dh += _through_gates(
                dgates_rows, b < rows_after, weight_ptr + head * U * U, u, H, U, MODE, G, ACC, PRECISION, BLOCK_B,
                BLOCK_U, BLOCK_K, STAGES,
            )  # fmt: skip
            dout += dh
            drawn = (B.to(tl.int64) * s + b)[:, None] * H + unit[None, :]
            passed, zoned = tl.zeros_like(dh), None
            if share_h is not None:
                kept = kept_of(dh, share_h, limit_h, seed_low, seed_high, drawn, 0)
                passed = kept * dout
                dout = (1.0 - kept) * dout
            if share_c is not None:
                zoned = kept_of(dh, share_c, limit_c, seed_low, seed_high, drawn, 1)
            of_c, of_n, of_m = dc, dn, dm
            if dcells_ptr is not None:
                more_c, more_n, more_m = load_cells(dcells_ptr, cell_at, here, of_c, H, MODE)
                of_c, of_n, of_m = of_c + more_c, of_n + more_n, of_m + more_m
            new_h, of_c, of_n, of_m, d0, d1, d2, d3 = cell_backward(
                dout, of_c, of_n, of_m, s0, s1, s2, s3, s4, h_before, c_before, n_before, c, n, zoned, p0, p1, p2,
                clip, MODE,
            )  # fmt: skip
            to = dgates_ptr + token[:, None] * D + unit[None, :]
            put(to, d0, here)
            if D > H:
                put(to + H, d1, here)
                put(to + 2 * H, d2, here)
                put(to + 3 * H, d3, here)
            publish(counters_ptr)
            done += 1
            dh = tl.where(here, passed + new_h, dh)
            dc, dn, dm = tl.where(here, of_c, dc), tl.where(here, of_n, dn), tl.where(here, of_m, dm)
    tl.store(dh_ptr + states, dh, mask=own)
    store_cells(dc_ptr, cell_states, dc, dn, dm, own, H, MODE)


def _hidden_before(layer: Layer, y: Tensor, h0: Tensor, offsets: Tensor | None) -> Tensor:
    """(tokens, H): h before the step of each token."""
    T, B, *strides = layer.strides()
    before = torch.empty_like(y)
    launch(
        rnn_before_kernel, (T, ceil_div(B * layer.hidden, BLOCK)), y, h0, offsets, before, T, B, *strides, layer.hidden,
        REVERSE=layer.options.reverse, BLOCK=BLOCK,
    )  # fmt: skip
    return before.view(-1, layer.hidden)


def _hidden_weight_gradient(layer: Layer, dgates: Tensor, before: Tensor) -> Tensor:
    """dW_hh, of a block diagonal its blocks, from dgates (tokens, D) and h before each token's step."""
    G, H, U, heads = layer.gates, layer.hidden, layer.units, layer.heads
    dweight = torch.empty_like(layer.inputs.weight_hh)
    # Rows of W_hh, and where their dgates begin.
    pieces = ((0, 2 * H, H), (2 * H, 3 * H, 0)) if layer.options.mode == "gru" else ((0, G * H, 0),)
    for begin, end, column in pieces:
        of_rows = dgates[:, column : column + end - begin]
        if heads == 1:
            torch.mm(of_rows.t(), before, out=dweight[begin:end])
            continue
        blocks = of_rows.view(-1, (end - begin) // H, heads, U).permute(2, 1, 3, 0).flatten(1, 2)
        product = torch.bmm(blocks, before.view(-1, heads, U).transpose(0, 1))
        dweight[begin:end].view(-1, heads, U, U).copy_(product.view(heads, -1, U, U).transpose(0, 1))
    return dweight


def _peephole_gradient(layer: Layer, dgates: Tensor, cells: Tensor, gates: Tensor, offsets: Tensor | None) -> Tensor:
    """Sums over tokens of di c, df c and do c', c' before zoneout mixed it."""
    H, wide = layer.hidden, cells.dtype
    assert layer.inputs.cx is not None
    before = _hidden_before(layer, cells, layer.inputs.cx.to(wide), offsets)
    after = cells.view(-1, H)
    if layer.options.zoneout_cell:
        i, f, g, _ = gates.view(-1, 4 * H).to(wide).chunk(4, 1)
        after = f * before + i * g
    parts = ((0, before), (1, before), (3, after))
    return torch.stack([(dgates[:, k * H : (k + 1) * H] * c).sum(0) for k, c in parts])


def rnn_backward(
    cotangents: RNNCotangents,
    inputs: RNNInputs,
    saved: RNNSaved,
    options: RNNOptions,
    needs_dx: bool,
    needs_dstates: bool,
    needs_dweights: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole and norms, as native code
    gives them; empty where they are not wanted."""
    layer = Layer(inputs, options)
    layer.check()

    x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, _, peephole, *_ = inputs
    (dy, dhy, dcy, dcells), (y, gates, cells, _), mode = cotangents, saved, options.mode
    wide, H, I, T = accumulator(x), layer.hidden, x.shape[-1], layer.steps
    for name, tensor, width, dtype in (
        ("dy", dy, H, x.dtype),
        ("y", y, H, x.dtype),
        ("gates", given(gates), layer.saved * H, x.dtype),
        ("cells", given(cells), layer.cells, wide),
        ("dcells", dcells, layer.cells, wide),
    ):
        require(name, tensor, (*layer.tokens, width), dtype)
    require("dhy", dhy, tuple(hx.shape), hx.dtype)
    require("dcy", dcy, (hx.shape[0], layer.cells), hx.dtype)

    D = (4 if mode == "gru" else layer.gates) * H
    dgates, h0, offsets = x.new_empty((y.numel() // H, D)), hx.to(x.dtype), layer.offsets()
    dh, dc = dhy.to(wide, copy=True), None if dcy is None else dcy.to(wide, copy=True)
    c0 = None if cx is None else cx.to(wide)

    # Step T takes dh to the first states.
    layer.launch(
        rnn_backward_kernel, dy, dcells, weight_hh, peephole, offsets, y, h0, given(gates), given(cells), c0, dgates,
        dh, dc, *layer.strides(), *layer.numbers(), first=0, last=T + needs_dstates,
    )  # fmt: skip

    grads = [x.new_empty(0)] * 10
    of_x = dgates[:, H:] if mode == "gru" else dgates
    if needs_dx:
        grads[0] = torch.mm(of_x, weight_ih).view(x.shape)
    if needs_dstates:
        grads[1:3] = dh.to(hx.dtype), grads[2] if dc is None else dc.to(hx.dtype)
    if needs_dweights:
        grads[3] = torch.mm(of_x.t(), x.view(-1, I))
        grads[4] = _hidden_weight_gradient(layer, dgates, _hidden_before(layer, y, h0, offsets))
        sums = dgates.sum(0, dtype=wide).to(x.dtype)
        if bias_ih is not None:
            grads[5] = sums[H:].clone() if mode == "gru" else sums
        if bias_hh is not None:
            grads[6] = torch.cat([sums[H : 3 * H], sums[:H]]) if mode == "gru" else sums.clone()
        if peephole is not None:
            grads[8] = _peephole_gradient(layer, dgates, cells, gates, offsets).to(x.dtype)
    return tuple(grads)
