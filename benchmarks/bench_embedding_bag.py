"""Bags of embeddings. Floor: each row that occurs is read once, each bag written once; a dense gradient also writes the
whole table.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .bench_embedding import indices_of, lookup, rows_of
from .suite import Call, Case, Cost, Place, Run, measure


def draw(
    ns: SimpleNamespace, sizes: dict[str, Any], place: Place
) -> tuple[torch.nn.EmbeddingBag, torch.Tensor, torch.Tensor]:
    """The module of ``ns``, indices (B, L) of B bags, and the gradient of the output (B, D)."""
    V, D, B, L = (sizes[key] for key in "VDBL")
    g = place.generator()
    module = place(ns.nn.EmbeddingBag(V, D, mode=sizes["mode"]))
    indices = place(indices_of("uniform", V, B * L, g).view(B, L))
    return module, indices, place(torch.randn(B, D, generator=g))


def make(V: int, D: int, B: int, L: int, mode: str, quick: tuple[str, ...] = ()) -> Case:
    sizes = {"V": V, "D": D, "B": B, "L": L, "mode": mode}

    def cost(phase: str, itemsize: int) -> Cost:
        looked_up, out = rows_of("uniform", V, B * L) * D * itemsize, B * D * itemsize
        if phase == "forward":
            return Cost(B * L * D, looked_up + 8 * B * L, out)
        return Cost(2.0 * B * L * D, looked_up + out + 16 * B * L, out + V * D * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        return lookup(phase, *draw(ns, sizes, place))

    name = f"embedding_bag/{V}x{D}x{B}x{L}/{mode}"
    phases = ("forward", "forward+backward")
    return Case("embedding_bag", name, "embedding_bag", phases, cost, setup, sizes, quick=quick, exact=V * D < 5e7)


CASES = [make(1_000_000, 128, 8192, 20, mode, ("forward",) if mode == "sum" else ()) for mode in ("sum", "mean", "max")]


def test_embedding_bag(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
