"""What the forward and the backward kernel of recurrent layers share: where a program works, where tokens lie, how
programs wait for each other, and how states are read and written. ``_rnn_layer`` has the ways through time.

Arguments come in groups. Triton compiles a kernel anew for an integer in a group that is 1 or a multiple of 16, so what
differs from call to call (sizes, steps, a seed) is an argument of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._rnn_cells import State

# Arguments of both kernels for which nothing is compiled anew.
CHANGING = ["T", "B", "time_stride", "row_stride", "seed", "first", "last"]


class RNNShape(NamedTuple):
    """What kernels are compiled for."""

    H: int
    U: int  # units of a head
    MODE: str
    G: int  # gates
    CELLS: int  # cell states of a unit
    SAVED: int  # numbers of a token and unit that the forward saves beside y
    REVERSE: bool
    ACC: tl.dtype
    PRECISION: str
    PROGRAMS: int  # of a chain
    BLOCK_B: int
    BLOCK_U: int
    BLOCK_K: int
    STAGES: int


class Numbers(NamedTuple):
    """Of options; None where there is none. Those that are not integers are tensors (1), because Triton passes a float
    in fp32, also beside fp64."""

    threshold_h: int | None  # of the random bits of elements that zoneout keeps
    threshold_c: int | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None
    clip: Tensor | None


class Sizes(NamedTuple):
    """T, B, and how many tokens lie between two times of a sequence (not packed) and between two sequences."""

    T: Any
    B: Any
    time_stride: Any
    row_stride: Any


class Place(NamedTuple):
    """Where a program works."""

    chain: Any
    head: Any
    first_b: Any
    b: Any  # sequences (BLOCK_B)
    u: Any  # units of the head (BLOCK_U),
    unit: Any  # the same of all heads,
    inside: Any  # and which of them there are
    mask: Any  # sequences and units that there are


class Options(NamedTuple):
    """Numbers in registers; each a tuple of one, or of none."""

    zoneout_h: Any
    zoneout_c: Any
    clip: Any
    peephole: Any  # of three


@triton.jit
def place_of(B, S):
    chain = tl.program_id(0).to(tl.int64)
    head, first_b = chain % (S.H // S.U), chain // (S.H // S.U) * S.BLOCK_B
    b, u = first_b + tl.arange(0, S.BLOCK_B), tl.program_id(1) * S.BLOCK_U + tl.arange(0, S.BLOCK_U)
    inside = u < S.U
    return Place(chain, head, first_b, b, u, head * S.U + u, inside, (b < B)[:, None] & inside[None, :])


@triton.jit
def step_at(offsets_ptr, s, sizes, REVERSE: tl.constexpr):
    """The token of the first sequence at step ``s``, and how many sequences have it: none outside [0, T)."""
    inside = (s >= 0) & (s < sizes.T)
    t = tl.where(inside, sizes.T - 1 - s if REVERSE else s, 0).to(tl.int64)
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr + t)
        rows = tl.load(offsets_ptr + t + 1) - begin
    else:
        begin, rows = t * sizes.time_stride, sizes.B.to(tl.int64)
    return begin, tl.where(inside, rows, 0)


@triton.jit
def wait(counter_ptr, steps, PROGRAMS: tl.constexpr):
    """Until all programs of the chain have signalled ``steps`` steps in this launch."""
    if counter_ptr is not None:
        while tl.atomic_add(counter_ptr, 0, sem="acquire") < steps * PROGRAMS:
            pass
        tl.debug_barrier()


@triton.jit
def signal(counter_ptr):
    """What this program has written is there for its own threads, and for whoever sees the counter move."""
    tl.debug_barrier()
    if counter_ptr is not None:
        tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def load_row(rows_ptr, place, row: tl.constexpr, S):
    """A row of (rows, H), as (1, units); zeros where there is none."""
    values = tl.zeros(place.unit.shape, S.ACC)
    if rows_ptr is not None:
        values = tl.load(rows_ptr + row * S.H + place.unit, mask=place.inside, other=0.0).to(S.ACC)
    return values[None, :]


@triton.jit
def load_parts(ptr, at, mask, COUNT: tl.constexpr, S, other=0.0):
    """A tuple of neighbours of H units each, the first at ``at``."""
    parts = ()
    for k in tl.static_range(COUNT):
        parts += (tl.load(ptr + at + k * S.H, mask=mask, other=other).to(S.ACC),)
    return parts


@triton.jit
def store_parts(ptr, at, parts, mask, S):
    for k in tl.static_range(len(parts)):
        tl.store(ptr + at + k * S.H, parts[k].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _number(ptr):
    number = ()
    if ptr is not None:
        number = (tl.load(ptr),)
    return number


@triton.jit
def load_options(numbers, peephole_ptr, place, S):
    peephole = ()
    if peephole_ptr is not None:
        for k in tl.static_range(3):
            peephole += (load_row(peephole_ptr, place, k, S),)
    return Options(_number(numbers.zoneout_h), _number(numbers.zoneout_c), _number(numbers.clip), peephole)


@triton.jit
def load_state(h_ptr, cells_ptr, place, S):
    b, unit = place.b[:, None], place.unit[None, :]
    (h,) = load_parts(h_ptr, b * S.H + unit, place.mask, 1, S)
    return State(h, load_parts(cells_ptr, b * (S.CELLS * S.H) + unit, place.mask, S.CELLS, S))


@triton.jit
def store_state(h_ptr, cells_ptr, state, place, S):
    b, unit = place.b[:, None], place.unit[None, :]
    store_parts(h_ptr, b * S.H + unit, (state.h,), place.mask, S)
    store_parts(cells_ptr, b * (S.CELLS * S.H) + unit, state.cells, place.mask, S)
