"""Embedding lookup. Floor: the looked-up rows once each way; a dense gradient also writes the whole table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure


def indices_of(kind: str, V: int, N: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids (N): uniform, Zipf (rank r with probability ~ 1/r, ranks scattered over the table) or all the same."""
    if kind == "same":
        return torch.full((N,), V // 2)
    if kind == "zipf":
        probability = 1 / torch.arange(1, V + 1, dtype=torch.float64)
        ranks = torch.multinomial(probability, N, replacement=True, generator=generator)
        return torch.randperm(V, generator=generator)[ranks]
    return torch.randint(V, (N,), generator=generator)


def _case(V: int, D: int, N: int, kind: str = "uniform", quick: bool = False) -> Case:
    name = f"embedding/{V}x{D}x{N}" + (f"/{kind}" if kind != "uniform" else "")

    def cost(phase: str, itemsize: int) -> Cost:
        rows, table = N * D * itemsize, V * D * itemsize
        if phase == "forward":
            return Cost(0, rows + 8 * N, rows)
        return Cost(N * D, 2 * rows + 16 * N, rows + table)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        torch.manual_seed(case.seed())
        module = ns.nn.Embedding(V, D).to(device, dtype)
        indices = indices_of(kind, V, N, g).to(device)
        dout = torch.randn(N, D, generator=g).to(device, dtype)

        def run() -> dict[str, Any]:
            if phase == "forward":
                with torch.no_grad():
                    return {"out": module(indices)}
            module.weight.grad = None
            out = module(indices)
            out.backward(dout)
            return {"out": out, "dweight": module.weight.grad}

        return run

    sizes = {"V": V, "D": D, "N": N}
    case = Case("embedding", name, ("forward", "forward+backward"), cost, setup, sizes, quick=quick, exact=V * D < 5e7)
    return case


def _step(V: int, D: int, N: int, sparse: bool) -> Case:
    """Lookup, backward and one Adam step. torch's sparse gradients need SparseAdam, another optimizer than Adam."""
    name = f"embedding/{V}x{D}x{N}/adam" + ("/sparse" if sparse else "")

    def cost(phase: str, itemsize: int) -> Cost:
        rows = N * D * itemsize
        # Exact Adam at batch cost: rows forward, gradient, and the batch's rows of p, m and v both ways.
        return Cost(14.0 * N * D, 5 * rows, 5 * rows)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        torch.manual_seed(case.seed())
        module = ns.nn.Embedding(V, D, sparse=sparse).to(device, dtype)
        optimizer = (ns.optim.SparseAdam if sparse else ns.optim.Adam)(module.parameters(), lr=1e-3)
        indices = indices_of("zipf", V, N, g).to(device)
        dout = torch.randn(N, D, generator=g).to(device, dtype)

        def run() -> dict[str, Any]:
            optimizer.zero_grad(set_to_none=True)
            module(indices).backward(dout)
            optimizer.step()
            return {"weight": module.weight}

        return run

    case = Case("embedding", name, ("step",), cost, setup, {"V": V, "D": D, "N": N}, dtypes=("fp32",))
    return case


def _bag(mode: str) -> Case:
    V, D, B, L = 1_000_000, 128, 8192, 20
    name = f"embedding_bag/{V}x{D}x{B}x{L}/{mode}"

    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(B * L * D, (B * L * D) * itemsize + 8 * B * L, B * D * itemsize)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        torch.manual_seed(case.seed())
        module = ns.nn.EmbeddingBag(V, D, mode=mode).to(device, dtype)
        indices = indices_of("uniform", V, B * L, g).view(B, L).to(device)

        def run() -> dict[str, Any]:
            with torch.no_grad():
                return {"out": module(indices)}

        return run

    sizes = {"V": V, "D": D, "B": B, "L": L}
    case = Case("embedding", name, ("forward",), cost, setup, sizes, dtypes=("fp32",), exact=False)
    return case


CASES = [
    *(_case(10000, 256, 1280, kind, quick=kind == "zipf") for kind in ("uniform", "zipf", "same")),
    *(_case(32000, 512, 8192, kind, quick=kind == "zipf") for kind in ("uniform", "zipf", "same")),
    *(_case(128256, 2048, 8192, kind) for kind in ("uniform", "zipf", "same")),
    *(_step(*s, sparse) for s in ((32000, 512, 8192), (128256, 2048, 8192)) for sparse in (False, True)),
    *(_bag(mode) for mode in ("sum", "mean", "max")),
]


def test_embedding(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
