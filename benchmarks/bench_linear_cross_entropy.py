"""Linear + cross-entropy. Floor: 2NHV FLOPs forward, 6NHV with both gradients; rows that are ignored cost nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure


def _case(N: int, H: int, V: int, ignored: float = 0.0, quick: bool = False) -> Case:
    name = f"linear_cross_entropy/{N}x{H}x{V}" + (f"/ignored={ignored:.0%}" if ignored else "")
    rows = N - round(N * ignored)

    def cost(phase: str, itemsize: int) -> Cost:
        operands = (N * H + V * H) * itemsize
        gemms = 1 if phase == "forward" else 3
        return Cost(2.0 * gemms * rows * H * V, operands, 0 if phase == "forward" else operands)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        x = torch.randn(N, H, generator=g).to(device, dtype)
        weight = (torch.randn(V, H, generator=g) / H**0.5).to(device, dtype)
        target = torch.randint(V, (N,), generator=g)
        target[torch.randperm(N, generator=g)[rows:]] = -100
        target = target.to(device)
        train = phase != "forward"
        x.requires_grad_(train), weight.requires_grad_(train)
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

    sizes = {"N": N, "H": H, "V": V}
    case = Case(
        "linear_cross_entropy",
        name,
        ("forward", "forward+backward"),
        cost,
        setup,
        sizes,
        quick=quick,
        exact=N * V < 4e7,
    )
    return case


CASES = [
    _case(1024, 512, 32000),
    _case(1024, 512, 32000, 0.5),
    _case(1024, 1024, 32000),
    _case(1024, 1024, 32000, 0.5),
    _case(512, 2048, 128256),
    _case(512, 2048, 128256, 0.5),
    _case(1280, 128, 10000, quick=True),
    _case(1280, 128, 10000, 0.5),
]


def test_linear_cross_entropy(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
