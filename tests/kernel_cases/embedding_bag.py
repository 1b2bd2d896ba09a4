"""Bags of 32 rows of a table of fp32 and of bf16, on average."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_cases import Case
from llmkern import kernels


def _call(device: torch.device, V: int, B: int, N: int) -> tuple[Tensor, Tensor]:
    """Indices and offsets; each row of the table is looked up as often."""
    offsets = torch.arange(B, device=device) * (N // B)
    return torch.arange(N, device=device) * 7 % V, offsets


def forward(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    weight = torch.zeros(V, D, dtype=dtype, device=device)
    kernels.embedding_bag_forward(weight, None, *_call(device, V, B, N), B, False, False, -1)


def weighted_mean(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    weight, samples = torch.zeros(V, D, dtype=dtype, device=device), torch.zeros(N, dtype=dtype, device=device)
    kernels.embedding_bag_forward(weight, samples, *_call(device, V, B, N), B, True, False, -1)


def largest(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    weight = torch.zeros(V, D, dtype=dtype, device=device)
    kernels.embedding_bag_max_forward(weight, *_call(device, V, B, N), B, False, -1)


def backward(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    dout = torch.zeros(B, D, dtype=dtype, device=device)
    kernels.embedding_bag_backward(dout, None, *_call(device, V, B, N), None, V, False, False, -1, False)


def weighted_mean_backward(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    dout, samples = torch.zeros(B, D, dtype=dtype, device=device), torch.zeros(N, dtype=dtype, device=device)
    kernels.embedding_bag_backward(dout, samples, *_call(device, V, B, N), None, V, True, False, 3, False)


def max_backward(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    dout = torch.zeros(B, D, dtype=dtype, device=device)
    chosen = torch.zeros(B, D, dtype=torch.int32, device=device)
    kernels.embedding_bag_backward(dout, None, *_call(device, V, B, N), chosen, V, False, False, -1, False)


def samples_backward(device: torch.device, dtype: torch.dtype, V: int, D: int, B: int, N: int) -> None:
    dout, weight = torch.zeros(B, D, dtype=dtype, device=device), torch.zeros(V, D, dtype=dtype, device=device)
    kernels.embedding_bag_samples_backward(dout, weight, *_call(device, V, B, N), False, False, -1)


SIZES = {"V": 1_000_000, "D": 128, "B": 8192, "N": 262_144}
SMALL = {"V": 200, "D": 128, "B": 20, "N": 640}

CASES: dict[str, Case] = {}
for dtype in (torch.float32, torch.bfloat16):
    sizes, small = {"dtype": dtype, **SIZES}, {"dtype": dtype, **SMALL}
    CASES[f"forward {dtype}"] = Case(forward, sizes, small, lambda dtype, V, D, B, N: (N + B) * D * dtype.itemsize)
    # Each term of a sum is a row of dout, read anew, mostly from a cache: the bytes of memory are (B + V) * D. What is
    # above are indices, some 100 bytes a position: half of them in the search for its bag, which a cache serves.
    CASES[f"backward {dtype}"] = Case(
        backward,
        sizes,
        small,
        lambda dtype, V, D, B, N: (N + V) * D * dtype.itemsize,
        allowed=1.25 if dtype == torch.float32 else 1.45,
    )
dtype = torch.float32
sizes, small = {"dtype": dtype, **SIZES}, {"dtype": dtype, **SMALL}
CASES["weighted mean"] = Case(weighted_mean, sizes)
CASES["weighted mean backward"] = Case(weighted_mean_backward, sizes)
CASES["max forward"] = Case(largest, sizes, small, lambda dtype, V, D, B, N: (N + B) * D * dtype.itemsize + 4 * B * D)
CASES["max backward"] = Case(
    max_backward,
    sizes,
    small,
    lambda dtype, V, D, B, N: (N + V) * D * dtype.itemsize + 4 * N * D,
    allowed=1.15,
)
CASES["samples backward"] = Case(
    samples_backward, sizes, small, lambda dtype, V, D, B, N: 2 * N * D * dtype.itemsize, allowed=1.15
)
