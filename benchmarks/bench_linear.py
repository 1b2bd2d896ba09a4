"""Linear layers. Floor: 2NIO FLOPs forward, 6NIO with both gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure


def draw(sizes: dict[str, Any], place: Place) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input (N, I), weight (O, I), bias (O) and the gradient (N, O) that comes back."""
    N, I, O = (sizes[key] for key in "NIO")
    g = place.generator()
    x, weight, bias, dy = (torch.randn(shape, generator=g) for shape in ((N, I), (O, I), (O,), (N, O)))
    return place(x), place(weight / I**0.5), place(bias), place(dy)


def make(N: int, I: int, O: int, quick: tuple[str, ...] = ()) -> Case:
    sizes = {"N": N, "I": I, "O": O}

    def cost(phase: str, itemsize: int) -> Cost:
        gemms = 1 if phase == "forward" else 3
        reads = (N * I + O * I + O) * itemsize
        gradients = (N * I + O * I + O) * itemsize
        return Cost(2.0 * gemms * N * I * O, reads, N * O * itemsize + (0 if phase == "forward" else gradients))

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        x, weight, bias, dy = draw(sizes, place)
        leaves = (x, weight, bias)
        for leaf in leaves:
            leaf.requires_grad_(phase != "forward")

        def run() -> dict[str, Any]:
            y = ns.functional.linear(*leaves)
            if phase == "forward":
                return {"y": y}
            dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
            return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}

        return run

    phases = ("forward", "forward+backward")
    return Case("linear", f"linear/{N}x{I}x{O}", "linear", phases, cost, setup, sizes, quick=quick)


# The last two stand at the size from which dispatch takes the kernel.
CASES = [
    make(2048, 128, 10000, quick=("forward+backward",)),
    make(2048, 2048, 2048),
    make(8, 1024, 32000),
    make(8, 512, 512),
    make(64, 128, 256),
]


def test_linear(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
