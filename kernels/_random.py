"""Random numbers from a counter: the bits of ``llmkern.reference._random``, in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(seed, index, salt: tl.constexpr):
    """uint32 for each element of ``index`` (int64, not negative). A kernel declares its ``seed`` as tl.int64, so that
    small seeds compile nothing new."""
    seed = seed.to(tl.int64)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    x = _mix(low * 0x9E3779B1 + seed.to(tl.uint32))
    x = x ^ (high * 0x85EBCA77 + (seed >> 32).to(tl.uint32))
    return _mix(x + tl.full((), (salt * 0xC2B2AE3D) & 0xFFFFFFFF, tl.uint32))


def threshold(p: float) -> int:
    """An element is drawn, with probability ``p``, if its bits, as a 64-bit number, are below this."""
    product = p * 2.0**32
    return int(product) + (product != int(product))
