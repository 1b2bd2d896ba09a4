"""Layer and root-mean-square normalisation. Floor: x read and y written; backwards x and dy read and dx written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure


def draw(sizes: dict[str, Any], place: Place) -> tuple[torch.Tensor, ...]:
    """x and dy (N, D), weight and bias (D)."""
    g = place.generator()
    N, D = sizes["N"], sizes["D"]
    x, dy, weight, bias = (place(torch.randn(shape, generator=g)) for shape in ((N, D), (N, D), (D,), (D,)))
    return x, dy, weight, bias


def make(norm: str, N: int, D: int, quick: tuple[str, ...] = ()) -> Case:
    sizes = {"N": N, "D": D}

    def cost(phase: str, itemsize: int) -> Cost:
        rows = N * D * itemsize
        # A mean, squares and the result; and as much again, twice, for the gradients.
        return Cost(8.0 * N * D, rows, rows) if phase == "forward" else Cost(20.0 * N * D, 3 * rows, 2 * rows)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        x, dy, weight, bias = draw(sizes, place)
        vectors = [weight, bias] if norm == "layer_norm" else [weight]
        leaves = [t.requires_grad_(phase != "forward") for t in (x, *vectors)]

        def run() -> dict[str, Any]:
            y = getattr(ns.functional, norm)(leaves[0], (D,), *leaves[1:])
            if phase == "forward":
                return {"y": y}
            grads = torch.autograd.grad(y, leaves, dy)
            return {"y": y, **dict(zip(("dx", "dweight", "dbias"), grads, strict=False))}

        return run

    phases = ("forward", "forward+backward")
    return Case("layer_norm", f"{norm}/{N}x{D}", norm, phases, cost, setup, sizes, quick=quick)


CASES = [
    make(norm, N, D, ("forward+backward",) if N == 8192 else ())
    for norm in ("layer_norm", "rms_norm")
    for N, D in ((1024, 768), (8192, 1024), (2048, 8192))
]


def test_layer_norm(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
