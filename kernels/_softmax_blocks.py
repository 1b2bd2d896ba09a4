"""Losses of rows that come in blocks of columns: a block's state, the row's outputs, then the gradient of a block.

For logits that are never there as a whole (`linear_cross_entropy`), and for rows so few that one program each would
leave most of a GPU idle (`cross_entropy`). Three kernels:

    partials   the state of each slice of each row: one read of the logits
    combine    the states of a row's slices, in their order: its outputs, and the factors of its gradient
    gradient   a slice's gradient from these factors: one read and one write; it may take the place of the logits

States take 20 bytes (28 with argmax) for each slice of a row and are read once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _faults
from ._launch import accumulator, ceil_div, launch
from ._softmax_rows import (
    NOWHERE,
    Cotangents,
    Factors,
    LogitGradients,
    Loss,
    Outputs,
    SoftmaxState,
    across,
    convert_options,
    finish,
    join,
    read_again,
    read_logits,
    read_on,
    read_target,
    start,
)

# Columns that one program takes.
SLICE = 8192


class States(NamedTuple):
    """Of slices of rows, a field after the other; what is not asked for is not written."""

    fields: Tensor  # (5, slices, N)
    places: Tensor | None  # (2, slices, N)
    z_y: Tensor | None  # (N): the logits of the targets


@triton.jit(do_not_specialize=["N", "V", "width", "first", "slice", "slices", "ignore_index"])
def cross_entropy_partials_kernel(
    x_ptr, targets, states, N, V, width, first, slice, slices, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    SLICE: tl.constexpr, STATES: tl.constexpr, ELEMENTS: tl.constexpr, S,
):  # fmt: skip
    """x (N, width) are the logits of classes ``first`` and on; slices are counted from ``slice``."""
    options = convert_options(keep, rest, z_loss, softcap, scale, S.ACC)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    begin = tl.program_id(1) * SLICE
    end = tl.minimum(begin + SLICE, width)
    y, counts, _ = read_target(targets, row, row < N, V, ignore_index, S)
    c = begin + tl.arange(0, STATES)[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    at, at_t, live = (row * width)[:, None] + c, (row * V + first)[:, None] + c, counts[:, None]
    # The first block apart: sums that start at a constant in a loop are a pattern that Triton 3.6 rewrites, wrongly.
    state = start(STATES, S.ACC)
    state = read_on(state, x_ptr, targets, at, at_t, first + c, (c < end) & live, options, S, "")
    for skip in range(STATES * ELEMENTS, end - begin, STATES * ELEMENTS):
        mask = (c + skip < end) & live
        state = read_on(state, x_ptr, targets, at + skip, at_t + skip, first + c + skip, mask, options, S, "")
    m, s, total, weighted, moment, best, bad = across(state, 0, S)
    to = (slice + tl.program_id(1)).to(tl.int64) * N + row
    field = slices.to(tl.int64) * N
    tl.store(states.fields + to, m)
    tl.store(states.fields + field + to, s)
    if S.SPREAD:
        tl.store(states.fields + 2 * field + to, total)
        tl.store(states.fields + 3 * field + to, weighted)
    if S.ENTROPY:
        tl.store(states.fields + 4 * field + to, moment)
    if S.ARGMAX:
        tl.store(states.places + to, best)
        tl.store(states.places + field + to, bad)
    if S.HARD:
        c_y = y - first
        mine = counts & (c_y >= begin) & (c_y < end)
        tl.store(states.z_y + row, read_logits(x_ptr, row * width + c_y, mine, options, S, ""), mask=mine)


@triton.jit
def _read_states(states, slice, slices, row, counts, N, BLOCK_P: tl.constexpr, S):
    """The states (rows, BLOCK_P) of the slices from ``slice`` on."""
    n = (slice + tl.arange(0, BLOCK_P))[None, :]
    mask, field = counts & (n < slices), slices.to(tl.int64) * N
    at = states.fields + n.to(tl.int64) * N + row
    m = tl.load(at, mask=mask, other=float("-inf"))
    s = tl.load(at + field, mask=mask, other=0.0)
    total, weighted, moment = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    best = tl.full(s.shape, NOWHERE, tl.int32)
    bad = best
    if S.SPREAD:
        total = tl.load(at + 2 * field, mask=mask, other=0.0)
        weighted = tl.load(at + 3 * field, mask=mask, other=0.0)
    if S.ENTROPY:
        moment = tl.load(at + 4 * field, mask=mask, other=0.0)
    if S.ARGMAX:
        place = states.places + n.to(tl.int64) * N + row
        best = tl.load(place, mask=mask, other=NOWHERE)
        bad = tl.load(place + field, mask=mask, other=NOWHERE)
    return SoftmaxState(m, s, total, weighted, moment, best, bad)


@triton.jit(do_not_specialize=["N", "V", "slices", "ignore_index"])
def cross_entropy_combine_kernel(
    states, targets, cotangents, outputs, factors_ptr, N, V, slices, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, S,
):  # fmt: skip
    options = convert_options(keep, rest, z_loss, softcap, scale, S.ACC)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    inside = row < N
    _, counts, w_y = read_target(targets, row, inside, V, ignore_index, S)
    state = _read_states(states, 0, slices, row, counts, N, BLOCK_P, S)
    for slice in range(BLOCK_P, slices, BLOCK_P):
        state = join(state, _read_states(states, slice, slices, row, counts, N, BLOCK_P, S), S)
    state = across(state, 1, S)
    z_y = tl.zeros((BLOCK_R, 1), S.ACC)
    if S.HARD:
        z_y = tl.load(states.z_y + row, mask=counts, other=0.0)
    factors = finish(state, z_y, w_y, row, counts, inside, options, cotangents, outputs, S)
    for k in tl.static_range(len(factors)):
        tl.store(factors_ptr + k * N + row, factors[k], mask=inside)


@triton.jit(do_not_specialize=["N", "V", "width", "first", "ignore_index"])
def cross_entropy_gradient_kernel(
    x_ptr, gradients, targets, factors_ptr, N, V, width, first, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    SLICE: tl.constexpr, STATES: tl.constexpr, ELEMENTS: tl.constexpr, S,
):  # fmt: skip
    options = convert_options(keep, rest, z_loss, softcap, scale, S.ACC)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    begin = tl.program_id(1) * SLICE
    end = tl.minimum(begin + SLICE, width)
    if gradients.blocked is not None:
        end = tl.where(tl.load(gradients.blocked) != 0, begin, end)
    y, counts, _ = read_target(targets, row, row < N, V, ignore_index, S)
    factors = ()
    for k in tl.static_range(7):
        factors += (tl.load(factors_ptr + row + k * N),)
    places = tl.arange(0, STATES)[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    for column in range(begin, end, STATES * ELEMENTS):
        c = column + places
        v = first + c
        mask = (c < end) & counts[:, None]
        at, at_t = (row * width)[:, None] + c, (row * V)[:, None] + v
        read_again(x_ptr, gradients, targets, at, at_t, v, y, factors, counts, c < end, mask, options, S)


class ColumnBlocks:
    """The losses of N rows whose logits come in blocks of columns: :meth:`read` each, :meth:`combine`, and then
    :meth:`gradient` of each. A block (N, width) is contiguous and holds the classes from ``first`` on."""

    def __init__(self, loss: Loss, like: Tensor, N: int, widths: list[int], entropy: bool, argmax: bool) -> None:
        self.loss, self.N, self.slice = loss, N, 0
        self.slices = sum(ceil_div(width, SLICE) for width in widths)
        dtype, shape = accumulator(like), (self.slices, N)
        places = like.new_empty((2, *shape), dtype=torch.int32) if argmax else None
        z_y = None if loss.soft else like.new_empty(N, dtype=dtype)
        self.states = States(like.new_empty((5, *shape), dtype=dtype), places, z_y)
        self.factors = like.new_empty((len(Factors._fields), N), dtype=dtype)
        self.shape = loss.shape(entropy, argmax, like)
        heavy = loss.spread or self.shape.CAP or entropy or argmax
        self.blocks: dict[str, Any] = {"SLICE": SLICE, "STATES": 128 if heavy else 256, "ELEMENTS": 8, "num_warps": 8}

    def read(self, x: Tensor, first: int) -> None:
        loss, width = self.loss, x.shape[1]
        grid = (self.N, ceil_div(width, SLICE))
        # One block reports bad targets for all.
        targets = loss.targets(_faults.word(_faults.TARGET) if self.slice == 0 else None)
        sizes = self.N, loss.V, width, first, self.slice, self.slices, loss.options.ignore_index
        launch(
            *(cross_entropy_partials_kernel, grid, x, targets, self.states, *sizes, *loss.numbers),
            **self.blocks,
            S=self.shape,
        )
        self.slice += grid[1]

    def combine(self, cotangents: Cotangents, outputs: Outputs) -> None:
        loss, grid = self.loss, (ceil_div(self.N, 32),)
        arguments = self.states, loss.targets(None), cotangents, outputs, self.factors
        numbers = self.N, loss.V, self.slices, loss.options.ignore_index, *loss.numbers
        launch(cross_entropy_combine_kernel, grid, *arguments, *numbers, BLOCK_R=32, BLOCK_P=16, S=self.shape)

    def gradient(
        self, x: Tensor, dx: Tensor | None, first: int, dprobabilities: Tensor | None, blocked: Tensor | None = None
    ) -> None:
        loss, width, grid = self.loss, x.shape[1], (self.N, ceil_div(x.shape[1], SLICE))
        arguments = x, LogitGradients(dx, dprobabilities, blocked), loss.targets(None), self.factors
        numbers = self.N, loss.V, width, first, loss.options.ignore_index, *loss.numbers
        launch(cross_entropy_gradient_kernel, grid, *arguments, *numbers, **self.blocks, S=self.shape)
