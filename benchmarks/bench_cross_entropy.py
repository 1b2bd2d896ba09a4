"""Cross-entropy from logits. Floor: forward reads N*V once; with the gradient it also writes N*V once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure


def _case(N: int, V: int, variant: str = "", quick: bool = False) -> Case:
    options: dict[str, Any] = {"smoothing": {"label_smoothing": 0.1}}.get(variant, {})
    name = f"cross_entropy/{N}x{V}" + (f"/{variant}" if variant else "")

    def cost(phase: str, itemsize: int) -> Cost:
        logits = N * V * itemsize
        targets = logits if variant == "soft" else N * 8
        # One exp counts as one FLOP: the floor is the traffic.
        return Cost(4.0 * N * V, logits + targets, logits if phase != "forward" else 0)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        logits = (3 * torch.randn(N, V, generator=g)).to(device, dtype)
        if variant == "soft":
            target = torch.randn(N, V, generator=g).softmax(-1).to(device, dtype)
        else:
            target = torch.randint(V, (N,), generator=g).to(device)
        keywords = dict(options)
        if variant == "weight":
            keywords["weight"] = (0.5 + torch.rand(V, generator=g)).to(device, dtype)
        logits.requires_grad_(phase != "forward")

        def run() -> dict[str, Any]:
            logits.grad = None
            loss = ns.functional.cross_entropy(logits, target, **keywords)
            if phase == "forward":
                return {"loss": loss}
            loss.backward()
            return {"loss": loss, "dlogits": logits.grad}

        return run

    sizes = {"N": N, "V": V}
    case = Case(
        "cross_entropy",
        name,
        ("forward", "forward+backward"),
        cost,
        setup,
        sizes,
        quick=quick,
        exact=N * V < 2e8,
    )
    return case


CASES = [
    _case(4096, 32000, quick=True),
    _case(4096, 32000, "smoothing"),
    _case(4096, 32000, "soft"),
    _case(4096, 32000, "weight"),
    _case(1024, 128256),
    _case(1280, 10000, quick=True),
    _case(1280, 10000, "smoothing"),
]


def test_cross_entropy(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
