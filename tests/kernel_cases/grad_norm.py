"""The norm of the gradients of a model, and their scaling."""

from __future__ import annotations

import math

import torch

from kernel_cases import Case
from llmkern import kernels

# An embedding, two layers of an LSTM, an output layer.
LARGE = ((50_257, 1024), *((4096, 1024), (4096, 1024), (4096,), (4096,)) * 2, (50_257, 1024), (50_257,))
SMALL = ((300, 128), *((32, 8), (32, 8), (32,), (32,)) * 5, (30, 8), (3,))


def norm(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> None:
    kernels.grad_norm([torch.zeros(shape, dtype=dtype, device=device) for shape in shapes])


def scale(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> None:
    factor = torch.full((), 0.5, dtype=torch.float64, device=device)
    kernels.scale_([torch.zeros(shape, dtype=dtype, device=device) for shape in shapes], factor)


CASES = {
    f"{name} {dtype}": Case(
        run,
        {"dtype": dtype, "shapes": LARGE},
        {"dtype": dtype, "shapes": SMALL},
        lambda dtype, shapes, passes=passes: passes * sum(map(math.prod, shapes)) * dtype.itemsize,
    )
    for name, run, passes in (("norm", norm, 1), ("scale", scale, 2))
    for dtype in (torch.float32, torch.bfloat16)
}
