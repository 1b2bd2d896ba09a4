"""The squared error: the sum with and without gradients, each element, and the backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernel_cases import Case
from llmkern import kernels


def forward(device: torch.device, dtype: torch.dtype, n: int, reduce: bool, gradients: int) -> None:
    x, t = (torch.zeros(n, dtype=dtype, device=device) for _ in range(2))
    scale = torch.ones((), device=device) if gradients else None
    kernels.mse_loss_forward(x, t, reduce, scale, gradients > 0, gradients > 1)


def backward(device: torch.device, dtype: torch.dtype, n: int, reduce: bool, gradients: int) -> None:
    x, t = (torch.zeros(n, dtype=dtype, device=device) for _ in range(2))
    dloss = torch.ones((), device=device) if reduce else torch.zeros(n, dtype=dtype, device=device)
    kernels.mse_loss_backward(dloss, x, t, reduce, True, gradients > 1)


def other_gradient(device: torch.device, dtype: torch.dtype, n: int, reduce: bool, gradients: int) -> None:
    x, t, dx = (torch.zeros(n, dtype=dtype, device=device) for _ in range(3))
    dloss, scale = torch.ones((), device=device), torch.zeros((), device=device)
    kernels.mse_loss_correct_(dloss, scale, x, t, dx, dx.new_empty(0))


def _floor(reads: int, writes: int) -> Callable[..., int]:
    return lambda dtype, n, reduce, gradients: (reads + writes) * n * dtype.itemsize


CASES = {}
for _dtype in (torch.float32, torch.bfloat16):
    for _name, _run, _reduce, _gradients, _reads, _writes in (
        ("sum and gradients", forward, True, 1, 2, 1),
        ("sum", forward, True, 0, 2, 0),
        ("each", forward, False, 0, 2, 1),
        ("backward of the sum", backward, True, 1, 2, 1),
        ("another gradient", other_gradient, True, 1, 2, 1),
        ("backward of each", backward, False, 2, 3, 2),
    ):
        _options = {"reduce": _reduce, "gradients": _gradients}
        CASES[f"{_name} {_dtype}"] = Case(
            _run,
            {"dtype": _dtype, "n": 1 << 26, **_options},
            {"dtype": _dtype, "n": 20_000, **_options},
            _floor(_reads, _writes),
        )
