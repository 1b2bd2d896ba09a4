"""Dropout whose mask is computed from a seed and an element's index.

Traffic: one read, one write; no mask is stored, and the backward is the same kernel. The hash is 16 instructions an
element, which hide behind the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _random
from ._blocks import load
from ._launch import acc_type, ceil_div, launch

BLOCK = 1024


@triton.jit
def _drop(x_ptr, y_ptr, i, mask, seed, limit, scale):
    x = load(x_ptr, i, mask).to(scale.dtype)
    bits = _random.random_bits(seed, i, 0)
    # A product with the mask, as torch's: what is dropped and not finite is NaN, so that guards see it.
    y = x * tl.where(bits.to(tl.int64) < limit, 0.0, scale)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "limit", "n"])
def dropout_forward_kernel(
    x_ptr, y_ptr, seed: tl.int64, limit: tl.int64, scale: tl.float64, n, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    i = begin + tl.arange(0, BLOCK)
    by = tl.full((), scale, ACC)
    if begin + BLOCK <= n:
        _drop(x_ptr, y_ptr, i, None, seed, limit, by)
    else:
        _drop(x_ptr, y_ptr, i, i < n, seed, limit, by)


def dropout_forward(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where an element is kept, else 0, by ``seed`` and its index. ``x`` contiguous."""
    y = torch.empty_like(x)
    grid, scale = (ceil_div(x.numel(), BLOCK),), 1 / (1 - p) if p < 1 else 0.0
    numbers = seed, _random.threshold(p), scale, x.numel()
    launch(dropout_forward_kernel, grid, x, y, *numbers, ACC=acc_type(x), BLOCK=BLOCK)
    return y
