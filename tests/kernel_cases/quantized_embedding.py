"""Lookups in quantised tables, and quantising."""

from __future__ import annotations

import torch

from kernel_cases import Case
from llmkern import kernels


def forward(device: torch.device, dtype: torch.dtype, bits: int, V: int, D: int, N: int) -> None:
    table = torch.zeros((V, D * bits // 8), dtype=torch.uint8, device=device)
    scale, offset = (torch.zeros(V, device=device) for _ in range(2))
    at = torch.zeros(N, dtype=torch.int64, device=device)
    kernels.quantized_embedding_forward(table, scale, offset, at, D, bits, dtype)


def quantize(device: torch.device, dtype: torch.dtype, bits: int, V: int, D: int) -> None:
    kernels.quantized_embedding_quantize(torch.zeros((V, D), dtype=dtype, device=device), bits)


CASES = {}
for _dtype in (torch.float32, torch.bfloat16):
    for _bits in (8, 4):
        CASES[f"{_bits} bits to {_dtype}"] = Case(
            forward,
            {"dtype": _dtype, "bits": _bits, "V": 50_257, "D": 1024, "N": 8192},
            {"dtype": _dtype, "bits": _bits, "V": 30, "D": 96, "N": 50},
            # An index, a scale and an offset a row.
            lambda dtype, bits, V, D, N: N * (8 + 8 + D * bits // 8 + D * dtype.itemsize),
        )
        CASES[f"{_dtype} to {_bits} bits"] = Case(
            quantize,
            {"dtype": _dtype, "bits": _bits, "V": 50_257, "D": 1024},
            {"dtype": _dtype, "bits": _bits, "V": 20, "D": 96},
            # A second reading, from the caches: counted here, not on a GPU.
            lambda dtype, bits, V, D: V * (8 + D * bits // 8 + 2 * D * dtype.itemsize),
        )
