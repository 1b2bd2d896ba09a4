"""Tuples of blocks, for what a kernel has as many of as its rule or cell says: states, gates, numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def where(mask, new, old):
    """``new`` where ``mask`` is true, else ``old``."""
    parts = ()
    for k in tl.static_range(len(new)):
        parts += (tl.where(mask, new[k], old[k]),)
    return parts


@triton.jit
def load(pointers, i, mask, ACC: tl.constexpr):
    """What is at ``i`` of each."""
    parts = ()
    for k in tl.static_range(len(pointers)):
        parts += (tl.load(pointers[k] + i, mask=mask).to(ACC),)
    return parts


@triton.jit
def store(pointers, i, parts, mask):
    for k in tl.static_range(len(pointers)):
        tl.store(pointers[k] + i, parts[k].to(pointers[k].dtype.element_ty), mask=mask)
