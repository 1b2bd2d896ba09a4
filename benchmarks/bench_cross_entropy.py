"""Cross-entropy from logits. Floor: forward reads N*V once; with the gradient it also writes N*V once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure


def draw(sizes: dict[str, Any], place: Place) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Logits (N, V), target (N) or (N, V), and the options of the variant."""
    N, V, variant = sizes["N"], sizes["V"], sizes["variant"]
    g = place.generator()
    logits = place(3 * torch.randn(N, V, generator=g))
    soft = variant == "soft"
    target = torch.randn(N, V, generator=g).softmax(-1) if soft else torch.randint(V, (N,), generator=g)
    options: dict[str, Any] = {"label_smoothing": 0.1} if variant == "smoothing" else {}
    if variant == "weight":
        options["weight"] = place(0.5 + torch.rand(V, generator=g))
    return logits, place(target), options


def make(N: int, V: int, variant: str = "", quick: tuple[str, ...] = ()) -> Case:
    sizes = {"N": N, "V": V, "variant": variant}

    def cost(phase: str, itemsize: int) -> Cost:
        logits = N * V * itemsize
        targets = logits if variant == "soft" else N * 8
        # One exp counts as one FLOP: the floor is the traffic.
        return Cost(4.0 * N * V, logits + targets, logits if phase != "forward" else 0)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        logits, target, options = draw(sizes, place)
        logits.requires_grad_(phase != "forward")

        def run() -> dict[str, Any]:
            logits.grad = None
            loss = ns.functional.cross_entropy(logits, target, **options)
            if phase == "forward":
                return {"loss": loss}
            loss.backward()
            return {"loss": loss, "dlogits": logits.grad}

        return run

    return Case(
        "cross_entropy",
        f"cross_entropy/{N}x{V}" + (f"/{variant}" if variant else ""),
        "cross_entropy",
        ("forward", "forward+backward"),
        cost,
        setup,
        sizes,
        quick=quick,
        exact=N * V < 2e8,
    )


CASES = [
    *(
        make(N, V, variant, quick if variant == "" else ())
        for N, V, quick in (
            (4096, 32000, ("forward+backward",)),
            (1024, 128256, ()),
            (1280, 10000, ("forward", "forward+backward")),
        )
        for variant in ("", "smoothing", "soft", "weight")
    ),
    *(replace(make(N, V), devices=("cuda",), exact=False) for N, V in ((8192, 32000), (4096, 128256))),
]


def test_cross_entropy(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
