"""Random numbers from a counter: a pure function of a seed, an index and a salt, so that no mask is ever stored.

Two rounds of a 32-bit integer hash (xor-shifts and multiplications). Kernels compute the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def random_bits(seed: Any, index: Tensor, salt: int) -> Tensor:
    """32 bits for each element of ``index`` (int64, not negative), as int64 in [0, 2^32). The seed may be a tensor."""
    x = _mix((index & _MASK) * 0x9E3779B1 + (seed & _MASK) & _MASK)
    x = x ^ ((index >> 32) * 0x85EBCA77 + (seed >> 32) & _MASK)
    return _mix(x + salt * 0xC2B2AE3D & _MASK)


def drawn(probability: float, seed: Any, index: Tensor, salt: int) -> Tensor:
    """Which elements are drawn, each with ``probability``; bool, of ``index``'s shape."""
    return random_bits(seed, index, salt) < probability * 2.0**32


def drawn_seed() -> Tensor:
    """A new seed in [0, 2^62) from torch's default generator, which it moves on: a tensor, which a graph draws anew in
    each of its runs."""
    return torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")


def draw_seed() -> int:
    """The same as a number."""
    return int(drawn_seed())


def shifted(seed: Any, offset: int) -> Any:
    """The seed, a number or a tensor, that gives at index i what ``seed`` gives at i + ``offset``, below 2^32."""
    return (seed & ~_MASK) | (seed + offset * 0x9E3779B1 & _MASK)
