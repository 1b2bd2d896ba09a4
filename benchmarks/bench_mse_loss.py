"""Mean squared error. Floor: both operands read once, each gradient written once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure


def _case(N: int, D: int, quick: bool = False) -> Case:
    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(3.0 * N * D, 2 * N * D * itemsize, 0 if phase == "forward" else N * D * itemsize)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        x, target = (torch.randn(N, D, generator=g).to(device, dtype) for _ in range(2))
        x.requires_grad_(phase != "forward")

        def run() -> dict[str, Any]:
            x.grad = None
            loss = ns.functional.mse_loss(x, target)
            if phase == "forward":
                return {"loss": loss}
            loss.backward()
            return {"loss": loss, "dx": x.grad}

        return run

    sizes = {"N": N, "D": D}
    case = Case("mse_loss", f"mse_loss/{N}x{D}", ("forward", "forward+backward"), cost, setup, sizes, quick=quick)
    return case


CASES = [_case(4096, 1024, quick=True), _case(8192, 4096)]


def test_mse_loss(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
