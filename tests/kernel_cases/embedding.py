"""Lookups in a vocabulary, and in a smaller table of fp32; the small sizes have every kind of run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernel_cases import Case
from llmkern import kernels


def _indices(device: torch.device, V: int, N: int) -> Tensor:
    """Some rows much more often than others."""
    if device.type == "meta":
        return torch.empty(N, dtype=torch.int64, device=device)
    return (torch.rand(N) ** 4 * V).long()


def forward(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int) -> None:
    kernels.embedding_forward(torch.zeros(V, D, dtype=dtype, device=device), _indices(device, V, N))


def backward(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int) -> None:
    kernels.embedding_backward(torch.zeros(N, D, dtype=dtype, device=device), _indices(device, V, N), V, -1, False)


def sparse_backward(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int) -> None:
    kernels.embedding_sparse_backward(torch.zeros(N, D, dtype=dtype, device=device), _indices(device, V, N), V, 0)


def by_freq(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int) -> None:
    kernels.embedding_backward(torch.zeros(N, D, dtype=dtype, device=device), _indices(device, V, N), V, -1, True)


def renorm(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int, norm_type: float) -> None:
    weight = torch.full((V, D), 2.0, dtype=dtype, device=device)
    kernels.embedding_renorm_(weight, _indices(device, V, N), 1.0, norm_type)


VOCABULARY = {"dtype": torch.bfloat16, "V": 128_256, "D": 4096, "N": 16_384}
TABLE = {"dtype": torch.float32, "V": 32_000, "D": 512, "N": 8192}
SMALL = {torch.bfloat16: {"V": 300, "D": 1024, "N": 700}, torch.float32: {"V": 200, "D": 512, "N": 500}}

CASES: dict[str, Case] = {}
for sizes in (VOCABULARY, TABLE):
    dtype = sizes["dtype"]
    small = {"dtype": dtype, **SMALL[dtype]}
    CASES[f"forward {dtype}"] = Case(forward, sizes, small, lambda dtype, V, D, N: 2 * N * D * dtype.itemsize)
    # The small batch has many rows in runs of more than 128: their sums go through fp32 partial sums.
    CASES[f"backward {dtype}"] = Case(backward, sizes, small, lambda dtype, V, D, N: (N + V) * D * dtype.itemsize)
CASES["sparse backward"] = Case(sparse_backward, TABLE)
CASES["backward by frequency"] = Case(by_freq, TABLE)
for norm_type in (2.0, 3.0, math.inf):
    CASES[f"renorm {norm_type:g}"] = Case(renorm, {**TABLE, "norm_type": norm_type})
