"""Recurrent layers, backward: time from its end, then products over all of time.

In the loop stands what no batching takes out of it, dh = dgates W_hh, by the same three ways as in the forward; tanh(c)
is computed again. Of its results only dgates are kept, in the dtype of x: dx = dgates W_ih, dW_ih = dgates^T x, dW_hh =
dgates^T h and the sums for biases follow as one product each, so that no sum over time is taken in steps.

Traffic of a token: dy, gates, c twice, and dgates once; then x, h of the step before and dgates as the products read
them. Each program reads its columns of W_hh and its sequences' dgates of the step after in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import RNNCotangents, RNNInputs, RNNOptions, RNNSaved
from . import _tuples
from ._launch import accumulator, ceil_div, launch
from ._rnn_cells import State, cell_backward, kept_by_zoneout
from ._rnn_layer import RNNLayer, given, require
from ._rnn_steps import (
    CHANGING,
    Sizes,
    load_options,
    load_parts,
    load_state,
    place_of,
    signal,
    step_at,
    store_parts,
    store_state,
    wait,
)

BLOCK = 1024


class RNNBackward(NamedTuple):
    dy: Tensor
    dcells: Tensor | None
    weight: Tensor
    peephole: Tensor | None
    offsets: Tensor | None
    y: Tensor
    h0: Tensor
    gates: Tensor | None
    cells: Tensor | None
    c0: Tensor | None
    dgates: Tensor
    dh: Tensor  # gradients at the last states, and then at the first
    dc: Tensor | None


@triton.jit(do_not_specialize=["T", "B", "time_stride", "row_stride"])
def rnn_before_kernel(tensors, T, B, time_stride, row_stride, H, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """h before the step of each token: program (s, j) has the j-th block of step s. ``tensors``: (y, h0, offsets or
    None, result)."""
    y_ptr, h0_ptr, offsets_ptr, before_ptr = tensors
    sizes = Sizes(T, B, time_stride, row_stride)
    s, i = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, unit = i // H, i % H
    begin, rows = step_at(offsets_ptr, s, sizes, REVERSE)
    earlier, rows_earlier = step_at(offsets_ptr, s - 1, sizes, REVERSE)
    follows = b < tl.minimum(rows, rows_earlier)
    h = tl.load(y_ptr + (earlier + b * row_stride) * H + unit, mask=follows, other=0.0)
    h0 = tl.load(h0_ptr + i, mask=(b < rows) & ~follows, other=0.0)
    tl.store(before_ptr + (begin + b * row_stride) * H + unit, tl.where(follows, h, h0), mask=b < rows)


@triton.jit
def _through_gates(dgates_rows, live, weight_ptr, place, S):
    """dgates W_hh of the place's units."""
    H, U, u = S.H, S.U, place.u
    weight_ptr += place.head * U * U
    total = tl.zeros((S.BLOCK_B, S.BLOCK_U), S.ACC)
    for first in tl.range(0, U, S.BLOCK_K, num_stages=S.STAGES):
        k = first + tl.arange(0, S.BLOCK_K)
        dgates, here = dgates_rows[:, None] + k[None, :], live[:, None] & (k < U)[None, :]
        weights, inside = weight_ptr + (k[:, None] * U + u[None, :]), (k < U)[:, None] & (u < U)[None, :]
        for g in tl.static_range(S.G):
            # Columns of gru: r dn, dr, dz, dn.
            column = (g + 1) % 3 if S.MODE == "gru" else g
            d = tl.load(dgates + column * H, mask=here, other=0.0)
            w = tl.load(weights + g * H * U, mask=inside, other=0.0)
            total = tl.dot(d, w, total, input_precision=S.PRECISION, out_dtype=S.ACC)
    return total


@triton.jit
def _load_before(ptr, at, first_ptr, first_at, follows, here, COUNT: tl.constexpr, S):
    """Parts of the state before a step: of the token before it, or the sequence's first."""
    parts = load_parts(ptr, at, here & follows, COUNT, S)
    return _tuples.where(follows, parts, load_parts(first_ptr, first_at, here & ~follows, COUNT, S))


@triton.jit
def _load_step(tensors, token, earlier, follows, here, place, S):
    """What a step's backward needs of its forward: saved numbers, and parts of the state before and of the cells."""
    C: tl.constexpr = S.CELLS * S.H
    b, unit = place.b[:, None], place.unit[None, :]
    if S.SAVED > 0:
        saved = load_parts(tensors.gates, token * (S.SAVED * S.H) + unit, here, S.SAVED, S)
    else:
        # Of a plain Elman network y says all.
        saved = load_parts(tensors.y, token * S.H + unit, here, 1, S)
    before, cells = (), ()
    if S.MODE == "gru":
        before = _load_before(tensors.y, earlier * S.H + unit, tensors.h0, b * S.H + unit, follows, here, 1, S)
    elif S.CELLS > 0:
        # slstm's m is not needed.
        needed: tl.constexpr = 1 if S.CELLS == 1 else 2
        at, first_at = earlier * C + unit, b * C + unit
        before = _load_before(tensors.cells, at, tensors.c0, first_at, follows, here, needed, S)
        # By n is divided.
        cells = load_parts(tensors.cells, token * C + unit, here, needed, S, 1.0)
    return saved, before, cells


@triton.jit
def _zoneout_backward(d, options, numbers, seed, drawn):
    """The gradient at what zoneout was given, that at the former h, and how much of c zoneout kept."""
    dh, dkept, kept_c = d.h, tl.zeros_like(d.h), ()
    if len(options.zoneout_h) > 0:
        kept = kept_by_zoneout(dh, options.zoneout_h, numbers.threshold_h, seed, drawn, 0)
        dkept = kept * dh
        dh = (1.0 - kept) * dh
    if len(options.zoneout_c) > 0:
        kept_c = (kept_by_zoneout(dh, options.zoneout_c, numbers.threshold_c, seed, drawn, 1),)
    return State(dh, d.cells), dkept, kept_c


@triton.jit
def _add(parts, more):
    sums = ()
    for k in tl.static_range(len(parts)):
        sums += (parts[k] + more[k],)
    return sums


@triton.jit(do_not_specialize=CHANGING)
def rnn_backward_kernel(tensors, numbers, counters_ptr, T, B, time_stride, row_stride, seed: tl.int64, first, last, S):
    """Step i takes dh through the gates of step T - i, if there is one, and then makes dgates of step T - 1 - i."""
    place, sizes = place_of(B, S), Sizes(T, B, time_stride, row_stride)
    if counters_ptr is not None:
        counters_ptr += place.chain
    state = load_state(tensors.dh, tensors.dc, place, S)
    options = load_options(numbers, tensors.peephole, place, S)
    unit, done = place.unit[None, :], first - first
    D: tl.constexpr = 4 * S.H if S.MODE == "gru" else S.G * S.H
    for i in tl.range(first, last, num_stages=1, disable_licm=S.PROGRAMS == 1):
        s = T - 1 - i
        after, rows_after = step_at(tensors.offsets, s + 1, sizes, S.REVERSE)
        begin, rows = step_at(tensors.offsets, s, sizes, S.REVERSE)
        if place.first_b < tl.maximum(rows, rows_after):
            earlier, rows_earlier = step_at(tensors.offsets, s - 1, sizes, S.REVERSE)
            token, here = (begin + place.b * row_stride)[:, None], (place.b < rows)[:, None] & place.inside[None, :]
            follows, earlier_token = (place.b < rows_earlier)[:, None], (earlier + place.b * row_stride)[:, None]
            saved, before, cells = _load_step(tensors, token, earlier_token, follows, here, place, S)
            (dy,) = load_parts(tensors.dy, token * S.H + unit, here, 1, S)
            wait(counters_ptr, done, S.PROGRAMS)
            # Nothing of sequences that have no step after this one.
            dgates_rows = tensors.dgates + (after + place.b * row_stride) * D + place.head * S.U
            dh = state.h + _through_gates(dgates_rows, place.b < rows_after, tensors.weight, place, S)
            dcells = state.cells
            if tensors.dcells is not None:
                at = token * (S.CELLS * S.H) + unit
                dcells = _add(dcells, load_parts(tensors.dcells, at, here, S.CELLS, S))
            drawn = (B.to(tl.int64) * s + place.b)[:, None] * S.H + unit
            d, dkept, kept_c = _zoneout_backward(State(dy + dh, dcells), options, numbers, seed, drawn)
            d, dgates = cell_backward(d, saved, before, cells, kept_c, options.peephole, options.clip, S.MODE)
            store_parts(tensors.dgates, token * D + unit, dgates, here, S)
            signal(counters_ptr)
            done += 1
            state = State(tl.where(here, dkept + d.h, dh), _tuples.where(here, d.cells, state.cells))
    store_state(tensors.dh, tensors.dc, state, place, S)


def _hidden_before(layer: RNNLayer, y: Tensor, h0: Tensor, offsets: Tensor | None) -> Tensor:
    """(tokens, H): h before the step of each token."""
    sizes, before, H = layer.sizes(), torch.empty_like(y), layer.hidden
    grid = sizes.T, ceil_div(sizes.B * H, BLOCK)
    launch(rnn_before_kernel, grid, (y, h0, offsets, before), *sizes, H, REVERSE=layer.options.reverse, BLOCK=BLOCK)
    return before.view(-1, layer.hidden)


def _hidden_weight_gradient(layer: RNNLayer, dgates: Tensor, before: Tensor) -> Tensor:
    """dW_hh, of a block diagonal its blocks, from dgates (tokens, D) and h before each token's step."""
    G, H, U, heads = layer.gates, layer.hidden, layer.units, layer.heads
    dweight = torch.empty_like(layer.inputs.weight_hh)
    # Rows of W_hh, and where their dgates begin.
    ranges = ((0, 2 * H, H), (2 * H, 3 * H, 0)) if layer.options.mode == "gru" else ((0, G * H, 0),)
    for begin, end, column in ranges:
        of_rows = dgates[:, column : column + end - begin]
        if heads == 1:
            torch.mm(of_rows.t(), before, out=dweight[begin:end])
            continue
        blocks = of_rows.view(-1, (end - begin) // H, heads, U).permute(2, 1, 3, 0).flatten(1, 2)
        product = torch.bmm(blocks, before.view(-1, heads, U).transpose(0, 1))
        dweight[begin:end].view(-1, heads, U, U).copy_(product.view(heads, -1, U, U).transpose(0, 1))
    return dweight


def _peephole_gradient(layer: RNNLayer, dgates: Tensor, cells: Tensor, gates: Tensor, offsets: Tensor | None) -> Tensor:
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
    layer = RNNLayer(inputs, options)
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
    tensors = RNNBackward(
        *(dy, dcells, weight_hh, peephole, offsets, y, h0, given(gates), given(cells), c0, dgates, dh, dc)
    )
    layer.launch(rnn_backward_kernel, tensors, 0, T + needs_dstates)

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
