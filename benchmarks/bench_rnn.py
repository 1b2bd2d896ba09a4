"""Recurrent layers. Floor: 2 FLOPs per weight per token forward, three times that with all gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _weights(kind: str, I: int, H: int, layers: int, directions: int, P: int) -> int:
    """The number of weights of all layers, biases apart."""
    out = P or H
    total = 0
    for layer in range(layers):
        width = I if layer == 0 else out * directions
        total += directions * (GATES[kind] * H * (width + out) + P * H)
    return total


def _case(kind: str, T: int, B: int, I: int, H: int, layers: int = 1, variant: str = "", quick: bool = False) -> Case:
    name = f"{kind.lower()}/{T}x{B}x{I}x{H}x{layers}" + (f"/{variant}" if variant else "")
    directions = 2 if variant == "bidirectional" else 1
    P = H // 2 if variant == "proj" else 0
    lengths = torch.linspace(T, T / 4, B).long() if variant == "packed" else torch.full((B,), T)
    tokens = int(lengths.sum())
    weights = _weights(kind, I, H, layers, directions, P)

    def cost(phase: str, itemsize: int) -> Cost:
        flops = 2.0 * weights * tokens * (1 if phase == "forward" else 3)
        activations = tokens * (I + directions * (P or H)) * itemsize
        return Cost(flops, weights * itemsize + activations, activations if phase == "forward" else 2 * activations)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        torch.manual_seed(case.seed())
        g = torch.Generator().manual_seed(case.seed())
        options: dict[str, Any] = {"bidirectional": directions == 2}
        if P:
            options["proj_size"] = P
        module = getattr(ns.nn, kind)(I, H, layers, **options).to(device, dtype)
        x = torch.randn(T, B, I, generator=g).to(device, dtype)
        dy = torch.randn(T, B, directions * (P or H), generator=g).to(device, dtype)
        inputs: Any = x
        if variant == "packed":
            pack = torch.nn.utils.rnn.pack_padded_sequence
            inputs, dy = pack(x, lengths), pack(dy, lengths).data
        data = inputs.data if variant == "packed" else inputs
        train = phase != "forward"
        data.requires_grad_(train)
        if variant == "packed":
            inputs = inputs._replace(data=data)

        def run() -> dict[str, Any]:
            with torch.set_grad_enabled(train):
                y = module(inputs)[0]
            y = y.data if variant == "packed" else y
            if not train:
                return {"y": y}
            data.grad = None
            module.zero_grad(set_to_none=True)
            y.backward(dy)
            return {"y": y, "dx": data.grad, **{f"d{n}": p.grad for n, p in module.named_parameters()}}

        return run

    sizes = {"T": T, "B": B, "I": I, "H": H, "layers": layers}
    case = Case("rnn", name, ("forward", "forward+backward"), cost, setup, sizes, quick=quick, exact=B * H * T < 4e6)
    return case


def _steps(name: str, kind: str, steps: int, B: int, I: int, H: int, phases: tuple[str, ...]) -> Case:
    """`steps` calls of a cell, or of a layer with T = 1: what decoding does."""

    def cost(phase: str, itemsize: int) -> Cost:
        weights = 4 * H * (I + H)
        # At B = 1 the weights are read again every step, from cache at best.
        return Cost(2.0 * weights * B * steps * (1 if phase == "forward" else 3), weights * itemsize, 0)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        torch.manual_seed(case.seed())
        g = torch.Generator().manual_seed(case.seed())
        module = getattr(ns.nn, kind)(I, H).to(device, dtype)
        x = torch.randn(steps, B, I, generator=g).to(device, dtype)
        train = phase != "forward"

        def forward() -> Any:
            state = None
            for t in range(steps):
                if kind == "LSTMCell":
                    state = module(x[t], state)
                else:
                    _, state = module(x[t : t + 1], state)
            return state

        def run() -> dict[str, Any]:
            with torch.set_grad_enabled(train):
                h, c = forward()
            if not train:
                return {"h": h, "c": c}
            module.zero_grad(set_to_none=True)
            h.sum().backward()
            return {"h": h, "c": c, **{f"d{n}": p.grad for n, p in module.named_parameters()}}

        return run

    case = Case("rnn", name, phases, cost, setup, {"T": steps, "B": B, "I": I, "H": H})
    return case


_SIZES = [
    (32, 64, 256, 128, 1),
    (128, 32, 512, 512, 1),
    (128, 32, 512, 512, 2),
    (256, 8, 1024, 1024, 1),
    (100, 1, 256, 256, 1),
    (35, 20, 650, 650, 2),
    (70, 80, 1150, 1150, 1),
]
CASES = [
    *(_case("LSTM", *s, quick=i in (0, 1)) for i, s in enumerate(_SIZES)),
    *(_case(kind, *_SIZES[i], quick=i == 0) for kind in ("GRU", "RNN") for i in (0, 1, 5)),
    *(_case("LSTM", 128, 32, 512, 512, 1, variant) for variant in ("packed", "bidirectional", "proj")),
    _steps("lstmcell/128x32x512x512", "LSTMCell", 128, 32, 512, 512, ("forward", "forward+backward")),
    _steps("lstm/decode/1x1x512x512", "LSTM", 100, 1, 512, 512, ("forward",)),
    _steps("lstmcell/decode/1x1x512x512", "LSTMCell", 100, 1, 512, 512, ("forward",)),
]


def test_rnn(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
