"""Input layers of transformers: embedding, positions, token types, norm and dropout. Floor: each row that occurs is
read once and the output written once; for gradients a norm reads the rows again, and the tables' gradients are written.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .bench_embedding import indices_of, rows_of
from .suite import Call, Case, Cost, Place, Run, measure

# What their input layers have beside embedding and positions.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "bert": {"num_token_types": 2, "norm": "layer"},
    "transformer": {"scale": 512**0.5},
}


class Composed(torch.nn.Module):
    """The same of torch's modules; parameters are drawn in the order of ``FusedEmbedding``'s."""

    def __init__(self, V: int, D: int, num_positions: int, dropout: float, **options: Any) -> None:
        super().__init__()
        self.words, self.positions = torch.nn.Embedding(V, D), torch.nn.Embedding(num_positions, D)
        types = options.get("num_token_types")
        self.types = None if types is None else torch.nn.Embedding(types, D)
        self.norm = torch.nn.LayerNorm(D) if "norm" in options else torch.nn.Identity()
        self.dropout, self.scale = torch.nn.Dropout(dropout), options.get("scale", 1.0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.words(input)
        if self.scale != 1:
            x = x * self.scale
        x = x + self.positions(torch.arange(input.shape[1], device=input.device))
        if self.types is not None:
            x = x + self.types(torch.zeros_like(input))
        return self.dropout(self.norm(x))


def draw(ns: SimpleNamespace, sizes: dict[str, Any], place: Place) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The module of ``ns``, tokens (B, L), and the gradient of the output (B, L, D)."""
    V, D, B, L = (sizes[key] for key in "VDBL")
    g = place.generator()
    make = getattr(ns.nn, "FusedEmbedding", Composed)
    module = place(make(V, D, num_positions=sizes["P"], dropout=sizes["dropout"], **MODELS[sizes["model"]]))
    indices = place(indices_of("zipf", V, B * L, g).view(B, L))
    return module, indices, place(torch.randn(B, L, D, generator=g))


def make(model: str, V: int, P: int, D: int, B: int, L: int, dropout: float = 0.0, quick: tuple[str, ...] = ()) -> Case:
    options = MODELS[model]
    sizes = {"model": model, "V": V, "P": P, "D": D, "B": B, "L": L, "dropout": dropout}

    def cost(phase: str, itemsize: int) -> Cost:
        rows, out = (rows_of("zipf", V, B * L) + L) * D * itemsize, B * L * D * itemsize
        flops = float(B * L * D * (10 if "norm" in options else 2))
        if phase == "forward":
            return Cost(flops, rows + 8 * B * L, out)
        again = rows if "norm" in options else 0
        return Cost(3 * flops, rows + again + out + 16 * B * L, out + (V + P) * D * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        module, indices, dout = draw(ns, sizes, place)

        def run() -> dict[str, Any]:
            if phase == "forward":
                with torch.no_grad():
                    results = {"out": module(indices)}
            else:
                module.zero_grad(set_to_none=True)
                out = module(indices)
                out.backward(dout)
                # Parameters by their order: their names differ.
                results = {"out": out, **{f"d{i}": p.grad for i, p in enumerate(module.parameters())}}
            # Two libraries drop different elements.
            return results if dropout == 0 else {}

        return run

    name = f"fused_embedding/{model}/{V}x{D}x{B}x{L}" + (f"/dropout={dropout}" if dropout else "")
    phases = ("forward", "forward+backward")
    return Case("fused_embedding", name, "fused_embedding", phases, cost, setup, sizes, quick=quick)


SIZES = (
    ("gpt2", 50257, 1024, 768, 8, 1024),
    ("bert", 30522, 512, 768, 32, 128),
    ("transformer", 32000, 1024, 512, 32, 256),
)
CASES = [
    *(make(*size, dropout) for size in SIZES for dropout in (0.0, 0.1)),
    make("bert", 30522, 512, 768, 1, 16),
]


def test_fused_embedding(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
