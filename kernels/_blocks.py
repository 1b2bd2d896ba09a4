"""Long vectors in blocks: every block but the last is whole and is read without a mask, because a masked load becomes
one of 16 bytes only where the compiler knows the length. And the end of a long sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(ptr, i, mask):
    """Elements ``i``; zeros where ``mask``, if there is one, is false."""
    return tl.load(ptr + i) if mask is None else tl.load(ptr + i, mask=mask, other=0.0)


@triton.jit
def sum_partials(partials_ptr, count, BLOCK: tl.constexpr):
    """The sum of ``count`` numbers by one program, in fp64: the same bits whatever ran where."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


def unit_d(D: int) -> int:
    """The power of two, at most 16, that divides D: a kernel that computes ``D // UNIT * UNIT`` lets the compiler know,
    and rows are read in vectors of as many elements. It knows by itself that an argument is a multiple of 16."""
    return D & -D if 0 < D & -D < 16 else 16
