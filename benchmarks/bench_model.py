"""Whole training steps: the article's encoder-decoder, and a two-layer LSTM language model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure


def _case(name: str, V: int, D: int, hidden: tuple[int, ...], T: int, B: int, quick: bool = False) -> Case:
    """Embedding(V, D), LSTMs of the widths `hidden` one after the other, Linear to V, cross-entropy, Adam."""
    widths = (D, *hidden)
    recurrent = sum(4 * h * (i + h) for i, h in zip(widths, hidden, strict=False))
    head = hidden[-1] * V
    parameters = V * D + recurrent + head + V + sum(8 * h for h in hidden)

    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(6.0 * T * B * (recurrent + head), 4 * parameters * itemsize, 3 * parameters * itemsize)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        torch.manual_seed(case.seed())
        g = torch.Generator().manual_seed(case.seed())
        embedding = ns.nn.Embedding(V, D)
        lstms = ns.nn.ModuleList(ns.nn.LSTM(i, h) for i, h in zip(widths, hidden, strict=False))
        linear = ns.nn.Linear(hidden[-1], V)
        modules = ns.nn.ModuleList([embedding, lstms, linear]).to(device, dtype)
        criterion = ns.nn.CrossEntropyLoss()
        optimizer = ns.optim.Adam(modules.parameters(), lr=1e-3)
        tokens = torch.randint(V, (T + 1, B), generator=g).to(device)

        def run() -> dict[str, Any]:
            optimizer.zero_grad(set_to_none=True)
            x = embedding(tokens[:-1])
            for lstm in lstms:
                x, _ = lstm(x)
            loss = criterion(linear(x).flatten(0, 1), tokens[1:].flatten())
            loss.backward()
            optimizer.step()
            return {"loss": loss, **dict(modules.named_parameters())}

        return run

    sizes = {"V": V, "D": D, "H": hidden[-1], "T": T, "B": B}
    case = Case("model", name, ("step",), cost, setup, sizes, quick=quick, exact=False)
    return case


CASES = [
    _case("model/article", 10000, 256, (128, 128), 32, 64, quick=True),
    _case("model/lm", 32000, 512, (512, 512), 70, 32),
]


def test_model(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
