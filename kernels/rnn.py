"""Recurrent layers, forward: a layer and direction over a whole sequence. ``_rnn_layer`` has the ways through time.

x W_ih^T is one product over all of time, to fp32, for as many steps at a time as fit in a workspace. What remains is h
W_hh^T, whose four gates of a unit are summed in the same program, so that the cell follows in registers. h and c are
carried there in fp32 (fp64 for fp64) from step to step; only h in the dtype of x goes by memory, to one of two places
in turns: whoever writes a place has seen that all others are done with what was there.

Traffic of a token: G H sums of x in fp32 (written once, read once) and y, gates and cells once. Each program reads its
rows of W_hh and its sequences' h of the step before in every step, from L2 or closer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._groups import RNNInputs, RNNOptions
from ._launch import accumulator
from ._rnn_cells import cell_forward, clamp, zone
from ._rnn_layer import (
    Layer,
    await_others,
    given,
    load_cells,
    load_row,
    publish,
    put,
    step_at,
    store_cells,
    wide_product,
)

# Of x W_ih^T.
WORKSPACE = 256 << 20


@triton.jit
def _start(
    gx, bias_ih_ptr, bias_hh_ptr, unit, mine, here, gate: tl.constexpr, H: tl.constexpr, MODE: tl.constexpr,
    G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the sum of a gate starts from: W_ih x + b_ih + b_hh. Of gru's n, x has number 2, and h number 3."""
    if gate < G:
        start = tl.load(gx + gate * H, mask=here, other=0.0) + load_row(bias_ih_ptr, unit, mine, gate, H, ACC)
        if MODE != "gru" or gate < 2:
            start += load_row(bias_hh_ptr, unit, mine, gate, H, ACC)
    else:
        start = tl.zeros(here.shape, ACC)
        if MODE == "gru":
            start += load_row(bias_hh_ptr, unit, mine, 2, H, ACC)
    return start


@triton.jit
def _add_product(
    r0, r1, r2, r3, h_rows, live, weight_ptr, u, H: tl.constexpr, U: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h W_hh^T of all gates of units ``u`` of a head, whose weights begin at ``weight_ptr``, added to their sums."""
    for first in tl.range(0, U, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        h = tl.load(h_rows[:, None] + k[None, :], mask=live[:, None] & (k < U)[None, :], other=0.0)
        weights, inside = weight_ptr + (u[None, :] * U + k[:, None]), (k < U)[:, None] & (u < U)[None, :]
        w = tl.load(weights, mask=inside, other=0.0)
        r0 = tl.dot(h, w, r0, input_precision=PRECISION, out_dtype=ACC)
        if G > 1:
            w1 = tl.load(weights + H * U, mask=inside, other=0.0)
            w2 = tl.load(weights + 2 * H * U, mask=inside, other=0.0)
            r1 = tl.dot(h, w1, r1, input_precision=PRECISION, out_dtype=ACC)
            if G == 3:
                r3 = tl.dot(h, w2, r3, input_precision=PRECISION, out_dtype=ACC)
            else:
                w3 = tl.load(weights + 3 * H * U, mask=inside, other=0.0)
                r2 = tl.dot(h, w2, r2, input_precision=PRECISION, out_dtype=ACC)
                r3 = tl.dot(h, w3, r3, input_precision=PRECISION, out_dtype=ACC)
    return r0, r1, r2, r3


@triton.jit(
    do_not_specialize=[
        *("gx_first", "T", "B", "time_stride", "row_stride", "seed_low", "seed_high", "limit_h", "limit_c"),
        *("first", "last"),
    ]
)
def rnn_forward_kernel(
    gx_ptr, turns_ptr, weight_ptr, bias_ih_ptr, bias_hh_ptr, peephole_ptr, offsets_ptr, y_ptr, gates_ptr, cells_ptr,
    h_ptr, c_ptr, gx_first, T, B, time_stride, row_stride, seed_low, seed_high, limit_h, limit_c, share_h_ptr,
    share_c_ptr, clip_ptr, counters_ptr, first, last, H: tl.constexpr, U: tl.constexpr, MODE: tl.constexpr,
    G: tl.constexpr, SAVED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps [first, last) of some units of a head, of a tile of sequences."""
    chain = tl.program_id(0).to(tl.int64)
    head, b_first = chain % (H // U), chain // (H // U) * BLOCK_B
    b, u = b_first + tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    unit, mine = head * U + u, u < U
    own = (b < B)[:, None] & mine[None, :]
    if counters_ptr is not None:
        counters_ptr += chain
    C: tl.constexpr = 3 * H if MODE == "slstm" else H
    states, cell_states = b[:, None] * H + unit[None, :], b[:, None] * C + unit[None, :]
    h = tl.load(h_ptr + states, mask=own, other=0.0)
    c, n, m = load_cells(c_ptr, cell_states, own, h, H, MODE)
    p0, p1, p2 = None, None, None
    if peephole_ptr is not None:
        p0, p1 = load_row(peephole_ptr, unit, mine, 0, H, ACC), load_row(peephole_ptr, unit, mine, 1, H, ACC)
        p2 = load_row(peephole_ptr, unit, mine, 2, H, ACC)
    # Not in a function of its own: none of Triton 3.6's returns None.
    share_h, share_c, clip = None, None, None
    if share_h_ptr is not None:
        share_h = tl.load(share_h_ptr)
    if share_c_ptr is not None:
        share_c = tl.load(share_c_ptr)
    if clip_ptr is not None:
        clip = tl.load(clip_ptr)
    done = first - first
    # Of all units, the addresses of weights would fill the registers if they left the loop.
    for s in tl.range(first, last, num_stages=1, disable_licm=PROGRAMS == 1):
        begin, rows = step_at(offsets_ptr, s, T, B, time_stride, REVERSE)
        if b_first < rows:
            token = begin + b * row_stride
            live = b < rows
            here = live[:, None] & mine[None, :]
            gx = gx_ptr + (token - gx_first)[:, None] * (G * H) + unit[None, :]
            r0 = _start(gx, bias_ih_ptr, bias_hh_ptr, unit, mine, here, 0, H, MODE, G, ACC)
            r1 = _start(gx, bias_ih_ptr, bias_hh_ptr, unit, mine, here, 1, H, MODE, G, ACC)
            r2 = _start(gx, bias_ih_ptr, bias_hh_ptr, unit, mine, here, 2, H, MODE, G, ACC)
            r3 = _start(gx, bias_ih_ptr, bias_hh_ptr, unit, mine, here, 3, H, MODE, G, ACC)
            if counters_ptr is not None:
                await_others(counters_ptr, done, PROGRAMS)
            h_rows = turns_ptr + (s % 2 * B.to(tl.int64) + b) * H + head * U
            r0, r1, r2, r3 = _add_product(
                r0, r1, r2, r3, h_rows, live, weight_ptr + head * U * U, u, H, U, G, ACC, PRECISION, BLOCK_K, STAGES
            )
            new_h, new_c, new_n, new_m, s0, s1, s2, s3, s4 = cell_forward(r0, r1, r2, r3, h, c, n, m, p0, p1, p2, MODE)
            if clip is not None:
                new_h = clamp(new_h, clip)
            drawn = (B.to(tl.int64) * s + b)[:, None] * H + unit[None, :]
            if share_h is not None:
                new_h = zone(new_h, h, share_h, limit_h, seed_low, seed_high, drawn, 0)
            if share_c is not None:
                new_c = zone(new_c, c, share_c, limit_c, seed_low, seed_high, drawn, 1)
            turn = turns_ptr + ((s + 1) % 2 * B.to(tl.int64) + b)[:, None] * H + unit[None, :]
            put(turn, new_h, here)
            publish(counters_ptr)
            done += 1
            put(y_ptr + token[:, None] * H + unit[None, :], new_h, here)
            if gates_ptr is not None:
                saved = gates_ptr + token[:, None] * (SAVED * H) + unit[None, :]
                put(saved, s0, here)
                if SAVED > 1:
                    put(saved + H, s1, here)
                    put(saved + 2 * H, s2, here)
                    put(saved + 3 * H, s3, here)
                if SAVED > 4:
                    put(saved + 4 * H, s4, here)
            h, c = tl.where(here, new_h, h), tl.where(here, new_c, c)
            n, m = tl.where(here, new_n, n), tl.where(here, new_m, m)
            if cells_ptr is not None:
                store_cells(cells_ptr, token[:, None] * C + unit[None, :], c, n, m, here, H, MODE)
    put(h_ptr + states, h, own)
    store_cells(c_ptr, cell_states, c, n, m, own, H, MODE)


def _chunks(layer: Layer) -> list[tuple[int, int]]:
    """Steps whose x W_ih^T is one product: consecutive tokens, which times of batch-first sequences are not."""
    T, B, _, _ = layer.strides()
    size = B * layer.gates * layer.hidden * accumulator(layer.inputs.x).itemsize
    longest = T if layer.options.batch_first else max(WORKSPACE // size, 1)
    return [(first, min(first + longest, T)) for first in range(0, T, longest)]


def _tokens(layer: Layer, first: int, last: int) -> tuple[int, int]:
    """Where the tokens of steps [first, last) lie."""
    T, B, _, _ = layer.strides()
    if layer.options.batch_first or (first, last) == (0, T):
        return 0, layer.inputs.x.shape[:-1].numel()
    first, last = (T - last, T - first) if layer.options.reverse else (first, last)
    if layer.inputs.batch_sizes is None:
        return first * B, last * B
    # Sizes of a packed batch lie on the host.
    return int(layer.inputs.batch_sizes[:first].sum()), int(layer.inputs.batch_sizes[:last].sum())


def rnn_forward(
    inputs: RNNInputs, options: RNNOptions, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, hy, cy, gates, cells, normed) as native code gives them; the last three empty where they are not wanted.
    Packed sequences copy ``batch_sizes`` to the device."""
    layer = Layer(inputs, options)
    layer.check()

    x, hx, cx = inputs[:3]
    wide, H = accumulator(x), layer.hidden
    y = x.new_empty((*layer.tokens, H))
    gates = x.new_empty((*layer.tokens, layer.saved * H) if save and layer.saved else 0)
    cells = x.new_empty((*layer.tokens, layer.cells) if save and cx is not None else 0, dtype=wide)
    h, c = hx.to(wide, copy=True), None if cx is None else cx.to(wide, copy=True)
    # h for the products of a step, and of the next one. Both, because sequences may begin at any step.
    turns = hx.to(x.dtype).repeat(2, 1)
    offsets, tokens = layer.offsets(), x.view(-1, x.shape[-1])

    for first, last in _chunks(layer):
        begin, end = _tokens(layer, first, last)
        gx = wide_product(tokens[begin:end], inputs.weight_ih)
        layer.launch(
            rnn_forward_kernel, gx, turns, inputs.weight_hh, inputs.bias_ih, inputs.bias_hh, inputs.peephole, offsets,
            y, given(gates), given(cells), h, c, begin, *layer.strides(), *layer.numbers(), first=first, last=last,
        )  # fmt: skip

    cy = hx.new_empty(0) if c is None else c.to(hx.dtype)
    return y, h.to(hx.dtype), cy, gates, cells, x.new_empty(0, dtype=wide)
