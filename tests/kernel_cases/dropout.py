"""Dropout of a layer's output."""

from __future__ import annotations

import torch

from kernel_cases import Case
from llmkern import kernels


def forward(device: torch.device, dtype: torch.dtype, n: int) -> None:
    kernels.dropout_forward(torch.empty(n, dtype=dtype, device=device), 0.1, 123456789123)


CASES = {
    f"forward {dtype}": Case(
        forward, {"dtype": dtype, "n": 1 << 24}, {"dtype": dtype, "n": 5000}, lambda dtype, n: 2 * n * dtype.itemsize
    )
    for dtype in (torch.float32, torch.bfloat16)
}
