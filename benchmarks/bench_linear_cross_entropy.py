"""Linear + cross-entropy. Floor: 2NHV FLOPs forward, 6NHV with both gradients; rows that are ignored cost nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure


def draw(sizes: dict[str, Any], place: Place) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input (N, H), weight (V, H) and target (N), of which some rows are ignored."""
    N, H, V = (sizes[key] for key in "NHV")
    g = place.generator()
    x = place(torch.randn(N, H, generator=g))
    weight = place(torch.randn(V, H, generator=g) / H**0.5)
    target = torch.randint(V, (N,), generator=g)
    target[torch.randperm(N, generator=g)[: round(N * sizes["ignored"])]] = -100
    return x, weight, place(target)


def make(N: int, H: int, V: int, ignored: float = 0.0, quick: tuple[str, ...] = ()) -> Case:
    sizes = {"N": N, "H": H, "V": V, "ignored": ignored}
    rows = N - round(N * ignored)

    def cost(phase: str, itemsize: int) -> Cost:
        operands = (rows * H + V * H) * itemsize
        gemms = 1 if phase == "forward" else 3
        return Cost(2.0 * gemms * rows * H * V, operands, 0 if phase == "forward" else (N * H + V * H) * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        x, weight, target = draw(sizes, place)
        train = phase != "forward"
        x.requires_grad_(train), weight.requires_grad_(train)
        # torch has it from 2.13 on.
        fused = getattr(ns.functional, "linear_cross_entropy", None)

        def run() -> dict[str, Any]:
            x.grad = weight.grad = None
            if fused is not None:
                loss = fused(x, weight, target)
            else:
                loss = ns.functional.cross_entropy(ns.functional.linear(x, weight), target)
            if not train:
                return {"loss": loss}
            loss.backward()
            return {"loss": loss, "dx": x.grad, "dweight": weight.grad}

        return run

    return Case(
        "linear_cross_entropy",
        f"linear_cross_entropy/{N}x{H}x{V}" + (f"/ignored={ignored:.0%}" if ignored else ""),
        "linear_cross_entropy",
        ("forward", "forward+backward"),
        cost,
        setup,
        sizes,
        quick=quick,
        exact=N * V < 4e7,
    )


CASES = [
    *(
        make(N, H, V, ignored, quick if not ignored else ())
        for N, H, V, quick in (
            (1024, 512, 32000, ("forward+backward",)),
            (1024, 1024, 32000, ()),
            (512, 2048, 128256, ()),
            (1280, 128, 10000, ("forward", "forward+backward")),
        )
        for ignored in (0.0, 0.5)
    ),
    *(replace(make(N, 4096, 128256), devices=("cuda",), exact=False) for N in (4096, 8192)),
]


def test_linear_cross_entropy(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
