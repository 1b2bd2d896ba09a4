"""Mean squared error. Floor: both operands read once, each gradient written once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure


def draw(sizes: dict[str, Any], place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target, both (N, D)."""
    g = place.generator()
    x, target = (place(torch.randn(sizes["N"], sizes["D"], generator=g)) for _ in range(2))
    return x, target


def make(N: int, D: int, quick: tuple[str, ...] = ()) -> Case:
    sizes = {"N": N, "D": D}

    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(3.0 * N * D, 2 * N * D * itemsize, 0 if phase == "forward" else N * D * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        x, target = draw(sizes, place)
        x.requires_grad_(phase != "forward")

        def run() -> dict[str, Any]:
            x.grad = None
            loss = ns.functional.mse_loss(x, target)
            if phase == "forward":
                return {"loss": loss}
            loss.backward()
            return {"loss": loss, "dx": x.grad}

        return run

    phases = ("forward", "forward+backward")
    return Case("mse_loss", f"mse_loss/{N}x{D}", "mse_loss", phases, cost, setup, sizes, quick=quick)


CASES = [make(4096, 1024, quick=("forward+backward",)), make(8192, 4096)]


def test_mse_loss(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
