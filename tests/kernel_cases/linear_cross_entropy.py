"""Linear + cross-entropy: chunks of rows, blocks of columns. The products are torch's and are not counted."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import Case
from llmkern import kernels
from llmkern._groups import LossOptions

PLAIN = LossOptions()


def operands(device: torch.device, dtype: torch.dtype, N: int, H: int, V: int) -> tuple[torch.Tensor, ...]:
    x, w = (torch.zeros(n, H, dtype=dtype, device=device) for n in (N, V))
    return x, w, torch.zeros(N, dtype=torch.int64, device=device)


def forward(device: torch.device, dtype: torch.dtype, N: int, H: int, V: int, workspace: int, gradient: bool) -> None:
    """Of a reduced loss, with its gradients, or of an evaluation."""
    x, w, target = operands(device, dtype, N, H, V)
    dloss = torch.ones(N, device=device) if gradient else None
    kernels.linear_cross_entropy_forward(
        x, w, None, target, None, dloss, PLAIN, workspace, False, False, gradient, gradient, False, False
    )


def backward(device: torch.device, dtype: torch.dtype, N: int, H: int, V: int, workspace: int) -> None:
    """Of losses that were not reduced."""
    x, w, target = operands(device, dtype, N, H, V)
    dloss = torch.ones(N, device=device)
    kernels.linear_cross_entropy_backward(
        dloss, None, None, x, w, None, target, None, PLAIN, workspace, True, True, False, False
    )


def passes(dtype: torch.dtype, N: int, V: int, count: int) -> int:
    return count * N * V * dtype.itemsize


LARGE = {"dtype": torch.bfloat16, "N": 8192, "H": 4096, "V": 128256}
SMALL: dict[str, Any] = {"dtype": torch.bfloat16, "N": 16, "H": 16, "V": 1000}
CASES = {
    # One read and one write of logits.
    "chunks of rows": Case(
        forward,
        {**LARGE, "workspace": 1 << 30, "gradient": True},
        {**SMALL, "workspace": 1 << 20, "gradient": True},
        lambda dtype, N, V, **_: passes(dtype, N, V, 2),
        # Not one row more: a chunk of it alone would go another way.
        again={"N": LARGE["N"] + 1024},
    ),
    # One read; and one read of the logits that are made again, and their write. Beside them states and factors.
    "blocks of columns": Case(
        backward,
        {**LARGE, "workspace": 64 << 20},
        {**SMALL, "workspace": 16 * 2 * 128},
        lambda dtype, N, V, **_: passes(dtype, N, V, 3),
        allowed=1.3,
    ),
    "evaluation": Case(
        forward,
        {**LARGE, "workspace": 64 << 20, "gradient": False},
        {**SMALL, "workspace": 16 * 2 * 128, "gradient": False},
        lambda dtype, N, V, **_: passes(dtype, N, V, 1),
        allowed=1.3,
    ),
}
