"""Whole training steps: the article's encoder-decoder, and a two-layer LSTM language model.

Floor: six FLOPs per weight of the matrices and token; every parameter with its gradient and Adam's states once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, adam, measure


def draw(ns: SimpleNamespace, sizes: dict[str, Any], place: Place) -> tuple[torch.nn.ModuleDict, torch.Tensor]:
    """The model of ``ns``: Embedding(V, D), LSTMs one after the other, Linear to V; and the tokens (T + 1, B)."""
    V, D, hidden = sizes["V"], sizes["D"], sizes["hidden"]
    g = place.generator()
    parts = {
        "embedding": ns.nn.Embedding(V, D),
        "lstms": ns.nn.ModuleList(ns.nn.LSTM(i, h) for i, h in zip((D, *hidden), hidden, strict=False)),
        "linear": ns.nn.Linear(hidden[-1], V),
    }
    return place(ns.nn.ModuleDict(parts)), place(torch.randint(V, (sizes["T"] + 1, sizes["B"]), generator=g))


def make(name: str, V: int, D: int, hidden: tuple[int, ...], T: int, B: int, quick: tuple[str, ...] = ()) -> Case:
    """Embedding, LSTMs of the widths `hidden`, Linear, cross-entropy, backward, one step of Adam."""
    sizes = {"V": V, "D": D, "hidden": hidden, "T": T, "B": B}
    recurrent = sum(4 * h * (i + h) for i, h in zip((D, *hidden), hidden, strict=False))
    head = hidden[-1] * V
    parameters = V * D + recurrent + head + V + sum(8 * h for h in hidden)

    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(6.0 * T * B * (recurrent + head), 4 * parameters * itemsize, 3 * parameters * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        model, tokens = draw(ns, sizes, place)
        criterion = ns.nn.CrossEntropyLoss()
        optimizer = adam(ns, model.parameters())

        def run() -> dict[str, Any]:
            optimizer.zero_grad(set_to_none=True)
            x = model["embedding"](tokens[:-1])
            for lstm in model["lstms"].children():
                x, _ = lstm(x)
            loss = criterion(model["linear"](x).flatten(0, 1), tokens[1:].flatten())
            loss.backward()
            optimizer.step()
            return {"loss": loss, **dict(model.named_parameters())}

        return run

    return Case("model", name, "model", ("step",), cost, setup, sizes, quick=quick, exact=False)


CASES = [
    make("model/article", 10000, 256, (128, 128), 32, 64, quick=("step",)),
    make("model/lm", 32000, 512, (512, 512), 70, 32),
]


def test_model(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
