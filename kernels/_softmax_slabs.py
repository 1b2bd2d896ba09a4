"""Losses of rows that come in slabs of columns: a slab's state, the row's outputs, and then the gradient of a slab.

For logits that are never there as a whole (`linear_cross_entropy`), and for rows so few that one program each would
leave most of a GPU idle (`cross_entropy`). Three kernels:

    partials   the state of each slice of each row: one read of the logits
    combine    the states of a row's slices, in their order: its outputs, and the factors of its gradient
    gradient   a slice's gradient from these factors: one read and one write; it may take the place of the logits

States take 20 bytes (28 with argmax) for each slice of a row and are read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _faults
from ._launch import acc_type, accumulator, ceil_div, launch
from ._softmax_rows import (
    NOWHERE,
    Cotangents,
    Loss,
    Outputs,
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


@triton.jit(do_not_specialize=["N", "V", "width", "first", "part", "parts", "ignore_index"])
def cross_entropy_partials_kernel(
    x_ptr, target_ptr, probabilities_ptr, weight_ptr, states_ptr, places_ptr, z_y_ptr, fault_ptr,
    N, V, width, first, part, parts, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
    SLICE: tl.constexpr, LANES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """x (N, width) are the logits of classes ``first`` and on; slices are counted from ``part``."""
    SHARES: tl.constexpr = SMOOTH or (probabilities_ptr is not None)
    ARGMAX: tl.constexpr = places_ptr is not None
    options = convert_options(keep, rest, z_loss, softcap, scale, ACC)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    begin = tl.program_id(1) * SLICE
    end = tl.minimum(begin + SLICE, width)
    y, counts, _ = read_target(target_ptr, None, fault_ptr, row, row < N, V, ignore_index, ACC)
    c = begin + tl.arange(0, LANES)[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    at, at_t = (row * width)[:, None] + c, (row * V + first)[:, None] + c
    # The first tile apart: sums that start at a constant in a loop are a pattern that Triton 3.6 rewrites, wrongly.
    state = read_on(
        start(LANES, ACC), x_ptr, probabilities_ptr, weight_ptr, at, at_t, first + c, (c < end) & counts[:, None],
        options, CAP, SHARES, ENTROPY, ARGMAX, ACC, "",
    )  # fmt: skip
    for skip in range(LANES * ELEMENTS, end - begin, LANES * ELEMENTS):
        state = read_on(
            state, x_ptr, probabilities_ptr, weight_ptr, at + skip, at_t + skip, first + c + skip,
            (c + skip < end) & counts[:, None], options, CAP, SHARES, ENTROPY, ARGMAX, ACC, "",
        )  # fmt: skip
    m, s, total, weighted, moment, best, bad = across(state, 0, SHARES, ENTROPY, ARGMAX)
    to = (part + tl.program_id(1)).to(tl.int64) * N + row
    field = parts.to(tl.int64) * N
    tl.store(states_ptr + to, m)
    tl.store(states_ptr + field + to, s)
    if SHARES:
        tl.store(states_ptr + 2 * field + to, total)
        tl.store(states_ptr + 3 * field + to, weighted)
    if ENTROPY:
        tl.store(states_ptr + 4 * field + to, moment)
    if ARGMAX:
        tl.store(places_ptr + to, best)
        tl.store(places_ptr + field + to, bad)
    if target_ptr is not None:
        c_y = y - first
        mine = counts & (c_y >= begin) & (c_y < end)
        z_y = read_logits(x_ptr, row * width + c_y, mine, options[3], options[4], CAP, ACC, "")
        tl.store(z_y_ptr + row, z_y, mask=mine)


@triton.jit
def _read_states(
    states_ptr, places_ptr, part, parts, row, counts, N,
    SHARES: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The states (rows, BLOCK_P) of the slices from ``part`` on."""
    n = (part + tl.arange(0, BLOCK_P))[None, :]
    mask, field = counts & (n < parts), parts.to(tl.int64) * N
    at = states_ptr + n.to(tl.int64) * N + row
    m = tl.load(at, mask=mask, other=float("-inf"))
    s = tl.load(at + field, mask=mask, other=0.0)
    total, weighted, moment = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    best = tl.full(s.shape, NOWHERE, tl.int32)
    bad = best
    if SHARES:
        total = tl.load(at + 2 * field, mask=mask, other=0.0)
        weighted = tl.load(at + 3 * field, mask=mask, other=0.0)
    if ENTROPY:
        moment = tl.load(at + 4 * field, mask=mask, other=0.0)
    if ARGMAX:
        place = places_ptr + n.to(tl.int64) * N + row
        best = tl.load(place, mask=mask, other=NOWHERE)
        bad = tl.load(place + field, mask=mask, other=NOWHERE)
    return m, s, total, weighted, moment, best, bad


@triton.jit(do_not_specialize=["N", "V", "parts", "ignore_index"])
def cross_entropy_combine_kernel(
    states_ptr, places_ptr, z_y_ptr, target_ptr, weight_ptr, dloss_ptr, dlse_ptr, dentropy_ptr,
    loss_ptr, lse_ptr, entropy_ptr, argmax_ptr, factors_ptr,
    N, V, parts, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    CAP: tl.constexpr, SHARES: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    HARD: tl.constexpr = target_ptr is not None
    ARGMAX: tl.constexpr = places_ptr is not None
    options = convert_options(keep, rest, z_loss, softcap, scale, ACC)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    inside = row < N
    _, counts, w_y = read_target(target_ptr, weight_ptr, None, row, inside, V, ignore_index, ACC)
    state = _read_states(states_ptr, places_ptr, 0, parts, row, counts, N, SHARES, ENTROPY, ARGMAX, BLOCK_P)
    for part in range(BLOCK_P, parts, BLOCK_P):
        later = _read_states(states_ptr, places_ptr, part, parts, row, counts, N, SHARES, ENTROPY, ARGMAX, BLOCK_P)
        state = join(state, later, SHARES, ENTROPY, ARGMAX)
    state = across(state, 1, SHARES, ENTROPY, ARGMAX)
    z_y = tl.zeros((BLOCK_R, 1), ACC)
    if HARD:
        z_y = tl.load(z_y_ptr + row, mask=counts, other=0.0)
    factors = finish(
        state, z_y, w_y, row, counts, inside, options,
        dloss_ptr, dlse_ptr, dentropy_ptr, loss_ptr, lse_ptr, entropy_ptr, argmax_ptr,
        CAP, HARD, SHARES, ENTROPY, ACC,
    )  # fmt: skip
    if factors_ptr is not None:
        for k in tl.static_range(7):
            tl.store(factors_ptr + k * N + row, factors[k], mask=inside)


@triton.jit(do_not_specialize=["N", "V", "width", "first", "ignore_index"])
def cross_entropy_gradient_kernel(
    x_ptr, dx_ptr, target_ptr, probabilities_ptr, dprobabilities_ptr, weight_ptr, factors_ptr, blocked_ptr,
    N, V, width, first, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
    SLICE: tl.constexpr, LANES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    HARD: tl.constexpr = target_ptr is not None
    SHARES: tl.constexpr = SMOOTH or (probabilities_ptr is not None)
    options = convert_options(keep, rest, z_loss, softcap, scale, ACC)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    begin = tl.program_id(1) * SLICE
    end = tl.minimum(begin + SLICE, width)
    if blocked_ptr is not None:
        end = tl.where(tl.load(blocked_ptr) != 0, begin, end)
    y, counts, _ = read_target(target_ptr, None, None, row, row < N, V, ignore_index, ACC)
    f = factors_ptr + row
    # In the order in which `finish` returns them.
    factors = (
        tl.load(f), tl.load(f + N), tl.load(f + 2 * N), tl.load(f + 3 * N), tl.load(f + 4 * N), tl.load(f + 5 * N),
        tl.load(f + 6 * N),
    )  # fmt: skip
    lanes = tl.arange(0, LANES)[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    for column in range(begin, end, LANES * ELEMENTS):
        c = column + lanes
        v = first + c
        mask = (c < end) & counts[:, None]
        at = (row * width)[:, None] + c
        read_again(
            dx_ptr, dprobabilities_ptr, x_ptr, probabilities_ptr, weight_ptr, at, (row * V)[:, None] + v, v, y, factors,
            counts, c < end, mask, options, CAP, HARD, SHARES, ENTROPY, ACC,
        )  # fmt: skip


class Slabs:
    """The losses of N rows whose logits come in slabs of columns: :meth:`read` each, :meth:`combine`, and then
    :meth:`gradient` of each. A slab (N, width) is contiguous and holds the classes from ``first`` on."""

    def __init__(self, loss: Loss, like: Tensor, N: int, widths: list[int], entropy: bool, argmax: bool) -> None:
        self.loss, self.N, self.like, self.entropy = loss, N, like, entropy
        self.parts, self.part = sum(ceil_div(width, SLICE) for width in widths), 0
        accumulated = accumulator(like)
        self.states = like.new_empty((5, self.parts, N), dtype=accumulated)
        self.places = like.new_empty((2, self.parts, N), dtype=torch.int32) if argmax else None
        self.z_y = None if loss.soft else like.new_empty(N, dtype=accumulated)
        self.factors = like.new_empty((7, N), dtype=accumulated)

    def _constants(self) -> dict[str, Any]:
        return {"CAP": self.loss.options.softcap != 0, "ENTROPY": self.entropy, "ACC": acc_type(self.like)}

    def _tiles(self) -> dict[str, Any]:
        heavy = self.loss.shares or self.loss.options.softcap != 0 or self.entropy or self.places is not None
        tiles = {"SLICE": SLICE, "LANES": 128 if heavy else 256, "ELEMENTS": 8, "num_warps": 8}
        return {"SMOOTH": self.loss.options.label_smoothing != 0, **self._constants(), **tiles}

    def read(self, x: Tensor, first: int) -> None:
        loss, width = self.loss, x.shape[1]
        slices = ceil_div(width, SLICE)
        # One slab reports bad targets for all.
        fault = _faults.word(_faults.TARGET) if self.part == 0 else None
        launch(
            cross_entropy_partials_kernel, (self.N, slices), x, loss.indices, loss.probabilities, loss.weight,
            self.states, self.places, self.z_y, fault, self.N, loss.V, width, first, self.part, self.parts,
            loss.options.ignore_index, *loss.numbers, **self._tiles(),
        )  # fmt: skip
        self.part += slices

    def combine(self, cotangents: Cotangents, outputs: Outputs) -> None:
        loss = self.loss
        launch(
            cross_entropy_combine_kernel, (ceil_div(self.N, 32),), self.states, self.places, self.z_y, loss.indices,
            loss.weight, *cotangents, *outputs, self.factors, self.N, loss.V, self.parts, loss.options.ignore_index,
            *loss.numbers, SHARES=loss.shares, **self._constants(), BLOCK_R=32, BLOCK_P=16,
        )  # fmt: skip

    def gradient(
        self, x: Tensor, dx: Tensor | None, first: int, dprobabilities: Tensor | None, blocked: Tensor | None = None
    ) -> None:
        loss, width = self.loss, x.shape[1]
        launch(
            cross_entropy_gradient_kernel, (self.N, ceil_div(width, SLICE)), x, dx, loss.indices, loss.probabilities,
            dprobabilities, loss.weight, self.factors, blocked, self.N, loss.V, width, first, loss.options.ignore_index,
            *loss.numbers, **self._tiles(),
        )  # fmt: skip
