"""Recurrent layers, forward: a layer and direction over a whole sequence. ``_rnn_layer`` has the ways through time.

x W_ih^T is one product over all of time, to fp32, for as many steps at a time as fit in a workspace. What remains is h
W_hh^T, whose four gates of a unit are summed in the same program, so that the cell follows in registers. h and c are
carried there in fp32 (fp64 for fp64) from step to step; only h in the dtype of x goes by memory, by a double buffer:
whoever writes to one half has seen that all others are done with what was there.

Traffic of a token: G H sums of x in fp32 (written once, read once) and y, gates and cells once. Each program reads its
rows of W_hh and its sequences' h of the step before in every step, from L2 or closer.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._groups import RNNInputs, RNNOptions
from . import _tuples
from ._launch import accumulator
from ._rnn_cells import State, cell_forward, clamp, kept_by_zoneout
from ._rnn_layer import RNNLayer, given, wide_product
from ._rnn_steps import (
    CHANGING,
    Sizes,
    load_options,
    load_row,
    load_state,
    place_of,
    signal,
    step_at,
    store_parts,
    store_state,
    wait,
)

# Of x W_ih^T.
WORKSPACE = 256 << 20


class RNNForward(NamedTuple):
    gx: Tensor  # x W_ih^T of the tokens from ``gx_first``
    buffers: Tensor  # h in the dtype of x, twice (B, H)
    weight: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    peephole: Tensor | None
    offsets: Tensor | None
    y: Tensor
    gates: Tensor | None
    cells: Tensor | None
    h: Tensor  # the states, before and then after the steps
    c: Tensor | None


@triton.jit
def _first_sums(tensors, rows, here, place, S):
    """What the sums of gates start from: W_ih x + b_ih + b_hh. That of gru's n is two: of x, and of h."""
    gx = tensors.gx + rows[:, None] * (S.G * S.H) + place.unit[None, :]
    sums = ()
    for g in tl.static_range(S.G):
        of_x = tl.load(gx + g * S.H, mask=here, other=0.0) + load_row(tensors.bias_ih, place, g, S)
        if S.MODE != "gru" or g < 2:
            of_x += load_row(tensors.bias_hh, place, g, S)
        sums += (of_x,)
    if S.MODE == "gru":
        sums += (tl.zeros(here.shape, S.ACC) + load_row(tensors.bias_hh, place, 2, S),)
    return sums


@triton.jit
def _add_product(sums, h_rows, live, weight_ptr, place, S):
    """h W_hh^T of the place's units, added to the sums of their gates."""
    H, U, u = S.H, S.U, place.u
    weight_ptr += place.head * U * U
    for first in tl.range(0, U, S.BLOCK_K, num_stages=S.STAGES):
        k = first + tl.arange(0, S.BLOCK_K)
        h = tl.load(h_rows[:, None] + k[None, :], mask=live[:, None] & (k < U)[None, :], other=0.0)
        weights, inside = weight_ptr + (u[None, :] * U + k[:, None]), (k < U)[:, None] & (u < U)[None, :]
        added = ()
        for g in tl.static_range(len(sums)):
            if S.MODE == "gru" and g == 2:
                # Of x alone; the sum of h is the fourth.
                added += (sums[g],)
            else:
                w = tl.load(weights + (2 if S.MODE == "gru" and g == 3 else g) * H * U, mask=inside, other=0.0)
                added += (tl.dot(h, w, sums[g], input_precision=S.PRECISION, out_dtype=S.ACC),)
        sums = added
    return sums


@triton.jit
def _clip_and_zoneout(new, old, options, numbers, seed, drawn):
    h, cells = new.h, new.cells
    if len(options.clip) > 0:
        h = clamp(h, options.clip[0])
    if len(options.zoneout_h) > 0:
        kept = kept_by_zoneout(h, options.zoneout_h, numbers.threshold_h, seed, drawn, 0)
        h = kept * old.h + (1.0 - kept) * h
    if len(options.zoneout_c) > 0:
        kept = kept_by_zoneout(h, options.zoneout_c, numbers.threshold_c, seed, drawn, 1)
        cells = (kept * old.cells[0] + (1.0 - kept) * cells[0],)
    return State(h, cells)


@triton.jit(do_not_specialize=[*CHANGING, "gx_first"])
def rnn_forward_kernel(
    tensors, numbers, counters_ptr, T, B, time_stride, row_stride, seed: tl.int64, first, last, gx_first, S
):
    """Steps [first, last) of some units of a head, of a block of sequences."""
    place, sizes = place_of(B, S), Sizes(T, B, time_stride, row_stride)
    if counters_ptr is not None:
        counters_ptr += place.chain
    state = load_state(tensors.h, tensors.c, place, S)
    options = load_options(numbers, tensors.peephole, place, S)
    unit, done = place.unit[None, :], first - first
    # Of all units, the addresses of weights would fill the registers if they left the loop.
    for s in tl.range(first, last, num_stages=1, disable_licm=S.PROGRAMS == 1):
        begin, rows = step_at(tensors.offsets, s, sizes, S.REVERSE)
        if place.first_b < rows:
            token, live = begin + place.b * row_stride, place.b < rows
            here = live[:, None] & place.inside[None, :]
            sums = _first_sums(tensors, token - gx_first, here, place, S)
            wait(counters_ptr, done, S.PROGRAMS)
            h_rows = tensors.buffers + (s % 2 * B.to(tl.int64) + place.b) * S.H + place.head * S.U
            sums = _add_product(sums, h_rows, live, tensors.weight, place, S)
            new, saved = cell_forward(sums, state, options.peephole, S.MODE)
            drawn = (B.to(tl.int64) * s + place.b)[:, None] * S.H + unit
            new = _clip_and_zoneout(new, state, options, numbers, seed, drawn)
            next_rows = (s + 1) % 2 * B.to(tl.int64) + place.b
            store_parts(tensors.buffers, next_rows[:, None] * S.H + unit, (new.h,), here, S)
            signal(counters_ptr)
            done += 1
            token = token[:, None]
            store_parts(tensors.y, token * S.H + unit, (new.h,), here, S)
            if tensors.gates is not None:
                store_parts(tensors.gates, token * (S.SAVED * S.H) + unit, saved, here, S)
            state = State(tl.where(here, new.h, state.h), _tuples.where(here, new.cells, state.cells))
            if tensors.cells is not None:
                store_parts(tensors.cells, token * (S.CELLS * S.H) + unit, state.cells, here, S)
    store_state(tensors.h, tensors.c, state, place, S)


def _chunks(layer: RNNLayer) -> list[tuple[int, int]]:
    """Steps whose x W_ih^T is one product: consecutive tokens, which times of batch-first sequences are not."""
    T, B, _, _ = layer.sizes()
    size = B * layer.gates * layer.hidden * accumulator(layer.inputs.x).itemsize
    longest = T if layer.options.batch_first else max(WORKSPACE // size, 1)
    return [(first, min(first + longest, T)) for first in range(0, T, longest)]


def _tokens(layer: RNNLayer, first: int, last: int) -> tuple[int, int]:
    """Where the tokens of steps [first, last) lie."""
    T, B, _, _ = layer.sizes()
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
    layer = RNNLayer(inputs, options)
    layer.check()

    x, hx, cx = inputs[:3]
    wide, H = accumulator(x), layer.hidden
    y = x.new_empty((*layer.tokens, H))
    gates = x.new_empty((*layer.tokens, layer.saved * H) if save and layer.saved else 0)
    cells = x.new_empty((*layer.tokens, layer.cells) if save and cx is not None else 0, dtype=wide)
    h, c = hx.to(wide, copy=True), None if cx is None else cx.to(wide, copy=True)
    # h for the products of a step, and of the next one. Both, because sequences may begin at any step.
    buffers = hx.to(x.dtype).repeat(2, 1)
    offsets, tokens = layer.offsets(), x.view(-1, x.shape[-1])

    for first, last in _chunks(layer):
        begin, end = _tokens(layer, first, last)
        gx = wide_product(tokens[begin:end], inputs.weight_ih)
        tensors = RNNForward(
            *(gx, buffers, inputs.weight_hh, inputs.bias_ih, inputs.bias_hh, inputs.peephole, offsets),
            *(y, given(gates), given(cells), h, c),
        )
        layer.launch(rnn_forward_kernel, tensors, first, last, begin)

    cy = hx.new_empty(0) if c is None else c.to(hx.dtype)
    return y, h.to(hx.dtype), cy, gates, cells, x.new_empty(0, dtype=wide)
