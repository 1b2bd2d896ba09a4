"""Cross-entropy from logits: rows that are held, rows that are read twice, rows in slices, classes that lie apart."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import Case
from llmkern import kernels
from llmkern._groups import LossOptions

PLAIN = LossOptions()
EVERY = LossOptions(-100, 0.1, 1e-4, 30.0, 0.5)


def logits_and_target(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], soft: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.zeros(shape, dtype=dtype, device=device)
    if soft:
        return logits, torch.full_like(logits, 1 / shape[1])
    return logits, torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=device)


def forward(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    soft: bool = False,
    every: bool = False,
    gradient: bool = True,
) -> None:
    """With the gradient, for a reduced loss; or without, in evaluation."""
    logits, target = logits_and_target(device, dtype, shape, soft)
    weight = torch.ones(shape[1], dtype=dtype, device=device) if every else None
    dloss = torch.ones((shape[0], *shape[2:]), device=device) if gradient else None
    options = EVERY if every else PLAIN
    kernels.cross_entropy_forward(
        logits, target, weight, dloss, options, every, every, gradient, gradient and soft and every
    )


def forward_(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, target = logits_and_target(device, dtype, shape, False)
    dloss = torch.ones(shape[0], device=device)
    kernels.cross_entropy_forward_(logits, target, None, dloss, PLAIN, False, False, False)


def backward(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Of losses that were not reduced, their lse and entropy."""
    logits, target = logits_and_target(device, dtype, shape, False)
    cotangents = [torch.ones(shape[0], device=device) for _ in range(3)]
    kernels.cross_entropy_backward(*cotangents, logits, target, None, PLAIN, True, False)


def bytes_of(dtype: torch.dtype, shape: tuple[int, ...], soft: bool = False, gradient: bool = True, **_: Any) -> int:
    """One read of logits and probabilities, one write of the gradient."""
    return torch.Size(shape).numel() * dtype.itemsize * (1 + gradient + soft)


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "held bf16": Case(forward, {"dtype": BF16, "shape": (8192, 16000)}, {"dtype": BF16, "shape": (3, 16000)}, bytes_of),
    "held, every option fp32": Case(
        forward,
        {"dtype": FP32, "shape": (4096, 8000), "every": True},
        {"dtype": FP32, "shape": (20, 1000), "every": True},
        # The class weights, once for each row, and from cache.
        bytes_of,
        allowed=1.6,
    ),
    "held, probabilities": Case(
        forward,
        {"dtype": BF16, "shape": (4096, 8000), "soft": True},
        {"dtype": BF16, "shape": (3, 8000), "soft": True},
        bytes_of,
    ),
    "several rows, in place": Case(
        forward_, {"dtype": FP32, "shape": (64, 1000)}, {"dtype": FP32, "shape": (64, 1000)}, bytes_of
    ),
    # Of 76 bytes a row; its target, cotangent and outputs take 24 more.
    "classes apart": Case(
        forward, {"dtype": BF16, "shape": (8, 150, 65536)}, {"dtype": BF16, "shape": (2, 19, 300)}, bytes_of, 1.6
    ),
    "many classes apart": Case(forward, {"dtype": BF16, "shape": (64, 32000, 128)}),
    # Read twice: the second time from the L2 cache.
    "twice bf16": Case(
        forward, {"dtype": BF16, "shape": (8192, 32000)}, {"dtype": BF16, "shape": (67, 16400)}, bytes_of, 1.55
    ),
    "twice, long bf16": Case(forward, {"dtype": BF16, "shape": (4096, 128256)}),
    "twice, long fp32": Case(forward, {"dtype": FP32, "shape": (4096, 128256)}),
    "twice, backward": Case(backward, {"dtype": BF16, "shape": (8192, 32000)}),
    "twice, every option": Case(forward, {"dtype": BF16, "shape": (4096, 128256), "soft": True, "every": True}),
    "evaluation": Case(
        forward,
        {"dtype": BF16, "shape": (4096, 128256), "gradient": False},
        {"dtype": BF16, "shape": (3, 16000), "gradient": False},
        bytes_of,
    ),
    "few rows": Case(
        forward,
        {"dtype": BF16, "shape": (8, 128256)},
        {"dtype": BF16, "shape": (2, 40000)},
        bytes_of,
        1.55,
    ),
    "few rows, every option": Case(forward, {"dtype": FP32, "shape": (8, 128256), "every": True}),
}
