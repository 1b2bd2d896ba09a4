"""Tables with row gradients and their dense twins, for tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from checks import INTERPRETING
from torch import Tensor

import llmkern.optim
from llmkern.nn import Embedding

# An odd number of columns has a tail in every vector length; 130 passes the four vectors that are summed together.
V, D, N = (14, 131, 5) if INTERPRETING else (40, 131, 9)


def embedding(dtype: torch.dtype = torch.float32, rows: Any = False, **options: Any) -> torch.nn.Embedding:
    """The same table in every dtype, of torch or with row gradients."""
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    if rows:
        return Embedding(V, D, _weight=table, row_grad=rows, **options)
    return torch.nn.Embedding(V, D, _weight=table, **options)


def batches(steps: int, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Indices (N), some rows much more often than others and the last two never; their gradients (N, D) in fp64."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            (torch.rand(N, generator=g) ** 3 * (V - 2)).long(),
            torch.randn(N, D, generator=g, dtype=torch.float64).float().double(),
        )
        for _ in range(steps)
    ]


def cosine(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / total))


def train(
    module: torch.nn.Embedding, optimizer: torch.optim.Optimizer, steps: list[tuple[Tensor, Tensor]], first: int = 0
) -> None:
    lr = optimizer.defaults["lr"]
    for i, (indices, dout) in enumerate(steps, first):
        optimizer.param_groups[0]["lr"] = lr * cosine(i, 20, 400)
        optimizer.zero_grad()
        module(indices).backward(dout.to(module.weight.dtype))
        optimizer.step()


def results(module: torch.nn.Embedding, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The table and its states as others read them."""
    states = optimizer.state_dict()["state"].get(0, {})
    return [module.state_dict()["weight"].clone(), *(states[key] for key in sorted(states) if states[key] is not None)]


class Pair:
    """A table with row gradients, whose rows wait, and its dense twin; both step with the same kernels' bits."""

    def __init__(self, rows: Any = "replay", steps: int = 6) -> None:
        self.rows, self.dense = embedding(rows=rows), Embedding(V, D, _weight=embedding().weight.data)
        self.optimizers = [llmkern.optim.AdamW(m.parameters(), lr=0.1) for m in (self.rows, self.dense)]
        self.train(steps)
        assert self.rows.weight.table.count == steps, "nothing was pending"

    def train(self, steps: int = 3, seed: int = 2) -> None:
        for module, optimizer in zip((self.rows, self.dense), self.optimizers, strict=True):
            train(module, optimizer, batches(steps, seed))

    def agree(self) -> bool:
        states = [optimizer.state_dict()["state"][0] for optimizer in self.optimizers]
        return torch.equal(self.rows.weight, self.dense.weight) and all(
            torch.equal(states[0][key], states[1][key]) for key in states[1]
        )
