"""Embedding lookup. Floor: each row that occurs is read once and every row of the output written once; a dense
gradient also writes the whole table, and a step of Adam reads and writes parameter and states of the rows that occur.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, adam, measure

KINDS = ("uniform", "zipf", "same")


def indices_of(kind: str, V: int, N: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids (N): uniform, Zipf (rank r with probability ~ 1/r, ranks scattered over the table) or all the same."""
    if kind == "same":
        return torch.full((N,), V // 2)
    if kind == "zipf":
        probability = 1 / torch.arange(1, V + 1, dtype=torch.float64)
        ranks = torch.multinomial(probability, N, replacement=True, generator=generator)
        return torch.randperm(V, generator=generator)[ranks]
    return torch.randint(V, (N,), generator=generator)


def rows_of(kind: str, V: int, N: int) -> int:
    """How many different rows such a batch looks up."""
    return len(indices_of(kind, V, N, torch.Generator().manual_seed(0)).unique())


def draw(
    ns: SimpleNamespace, sizes: dict[str, Any], place: Place
) -> tuple[torch.nn.Embedding, torch.Tensor, torch.Tensor]:
    """The module of ``ns``, indices (N) and the gradient of the output (N, D)."""
    V, D, N = (sizes[key] for key in "VDN")
    g = place.generator()
    ours = {"row_grad": True} if ns.name == "llmkern" and sizes.get("row_grad") else {}
    module = place(ns.nn.Embedding(V, D, sparse=sizes.get("sparse", False), **ours))
    indices = place(indices_of(sizes["kind"], V, N, g))
    return module, indices, place(torch.randn(N, D, generator=g))


def lookup(phase: str, module: Any, indices: torch.Tensor, dout: torch.Tensor) -> Call:
    """A call of an embedding or a bag, and in training its backward for dout."""

    def run() -> dict[str, Any]:
        if phase == "forward":
            with torch.no_grad():
                return {"out": module(indices)}
        module.weight.grad = None
        out = module(indices)
        out.backward(dout)
        return {"out": out, "dweight": module.weight.grad}

    return run


def make(V: int, D: int, N: int, kind: str = "uniform", quick: tuple[str, ...] = ()) -> Case:
    sizes = {"V": V, "D": D, "N": N, "kind": kind}

    def cost(phase: str, itemsize: int) -> Cost:
        looked_up, out, table = rows_of(kind, V, N) * D * itemsize, N * D * itemsize, V * D * itemsize
        if phase == "forward":
            return Cost(0, looked_up + 8 * N, out)
        return Cost(N * D, looked_up + out + 16 * N, out + table)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        return lookup(phase, *draw(ns, sizes, place))

    name = f"embedding/{V}x{D}x{N}" + (f"/{kind}" if kind != "uniform" else "")
    phases = ("forward", "forward+backward")
    return Case("embedding", name, "embedding", phases, cost, setup, sizes, quick=quick, exact=V * D < 5e7)


# Batches that steps take by turns: a row waits for its next lookup, as in training.
BATCHES = 16


def make_step(V: int, D: int, N: int, kind: str, sparse: bool = False, quick: tuple[str, ...] = ()) -> Case:
    """Lookup, backward and one Adam step; ours with row gradients, which give what the dense optimizer gives. torch's
    sparse gradients need SparseAdam, another optimizer than Adam."""
    sizes = {"V": V, "D": D, "N": N, "kind": kind, "sparse": sparse, "row_grad": not sparse}

    def cost(phase: str, itemsize: int) -> Cost:
        rows = rows_of(kind, V, N)
        looked_up, out = rows * D * itemsize, N * D * itemsize
        # Adam is elementwise, so that rows that do not occur can wait: the batch's rows of p, m and v both ways.
        return Cost(N * D + 13.0 * rows * D, 3 * looked_up + out + 16 * N, 3 * looked_up + out)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        module, first, dout = draw(ns, sizes, place)
        g = place.generator()
        batches = itertools.cycle([first, *(place(indices_of(kind, V, N, g)) for _ in range(BATCHES - 1))])
        parameters = list(module.parameters())
        optimizer = ns.optim.SparseAdam(parameters, lr=1e-3) if sparse else adam(ns, parameters)

        def run() -> dict[str, Any]:
            optimizer.zero_grad(set_to_none=True)
            module(next(batches)).backward(dout)
            optimizer.step()
            return {"weight": module.weight}

        return run

    name = f"embedding/{V}x{D}x{N}" + (f"/{kind}" if kind != "uniform" else "")
    name += "/adam" + ("/sparse" if sparse else "")
    # The reference has no sparse gradients.
    exact = not sparse and V * D < 5e7
    return Case("embedding", name, "embedding_step", ("step",), cost, setup, sizes, quick=quick, exact=exact)


SIZES = ((10000, 256, 1280), (32000, 512, 8192), (128256, 2048, 8192))
CASES = [
    *(
        make(*s, kind, ("forward", "forward+backward") if (s, kind) == (SIZES[1], "zipf") else ())
        for s in SIZES
        for kind in KINDS
    ),
    *(
        make_step(*s, kind, sparse, ("step",) if (s, kind) == (SIZES[1], "zipf") else ())
        for s in SIZES
        for kind in KINDS
        for sparse in (False, True)
    ),
    # A step costs what its batch costs, whatever the size of the table.
    *(make_step(V, 128, 8192, "uniform") for V in (10_000, 100_000, 1_000_000)),
    *(replace(make(128256, 4096, 16384, kind), devices=("cuda",), exact=False) for kind in ("uniform", "zipf")),
]


def test_embedding(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
