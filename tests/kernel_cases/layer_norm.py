"""Layer and root-mean-square norms of transformers, with rows of several lengths."""

from __future__ import annotations

import torch

from kernel_cases import Case
from llmkern import kernels


def forward(device: torch.device, dtype: torch.dtype, N: int, D: int, rms: bool) -> None:
    x, w = torch.ones((N, D), dtype=dtype, device=device), torch.ones(D, dtype=dtype, device=device)
    kernels.layer_norm_forward(x, w, None if rms else w, 1e-5, rms)


def backward(device: torch.device, dtype: torch.dtype, N: int, D: int, rms: bool) -> None:
    x, dy = (torch.ones((N, D), dtype=dtype, device=device) for _ in range(2))
    w, stats = torch.ones(D, dtype=dtype, device=device), torch.ones((N, 2), device=device)
    kernels.layer_norm_backward(dy, x, stats, w, None if rms else w, 1e-5, rms, 3 if rms else 7)


def _forward_floor(dtype: torch.dtype, N: int, D: int, rms: bool) -> int:
    return 2 * N * D * dtype.itemsize + 8 * N


def _backward_floor(dtype: torch.dtype, N: int, D: int, rms: bool) -> int:
    return 3 * N * D * dtype.itemsize + 8 * N


CASES = {}
for _dtype, _D, _rms in (
    (torch.float32, 768, False),
    (torch.bfloat16, 4096, True),
    (torch.bfloat16, 1024, False),
    (torch.float32, 100, False),
):
    _sizes = {"dtype": _dtype, "N": 1 << 14, "D": _D, "rms": _rms}
    _small = {**_sizes, "N": 256}
    # A program reads weight and bias, which lie in a cache, for one or two rows; and the parts of the chunks, which
    # are small beside 2^14 rows, count for something beside 256.
    CASES[f"forward {_D} {_dtype}"] = Case(forward, _sizes, _small, _forward_floor, 1.55)
    CASES[f"backward {_D} {_dtype}"] = Case(backward, _sizes, _small, _backward_floor, 1.55)
# Longer than what stays in registers: read again, by a factor that a cache takes.
_sizes = {"dtype": torch.bfloat16, "N": 1 << 12, "D": 12288, "rms": False}
CASES["long forward"] = Case(forward, _sizes)
CASES["long backward"] = Case(backward, _sizes)
