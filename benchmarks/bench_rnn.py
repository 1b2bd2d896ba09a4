"""Recurrent layers. Floor: 2 FLOPs per weight per token forward, three times that with all gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from .suite import Call, Case, Cost, Place, Run, measure

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def lengths_of(sizes: dict[str, Any]) -> torch.Tensor:
    """The length of each sequence (B), longest first."""
    T, B = sizes["T"], sizes["B"]
    return torch.linspace(T, T / 4, B).long() if sizes["variant"] == "packed" else torch.full((B,), T)


def draw(
    ns: SimpleNamespace, sizes: dict[str, Any], place: Place
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The module of ``ns``, its input (T, B, I), and the gradient of its output (T, B, directions * H)."""
    T, B, I, H, variant = (sizes[key] for key in ("T", "B", "I", "H", "variant"))
    g = place.generator()
    options: dict[str, Any] = {"bidirectional": True} if variant == "bidirectional" else {}
    if variant == "proj":
        options["proj_size"] = H // 2
    module = place(getattr(ns.nn, sizes["kind"])(I, H, sizes["layers"], **options))
    out = {"bidirectional": 2 * H, "proj": H // 2}.get(variant, H)
    return module, place(torch.randn(T, B, I, generator=g)), place(torch.randn(T, B, out, generator=g))


def make(
    kind: str, T: int, B: int, I: int, H: int, layers: int = 1, variant: str = "", quick: tuple[str, ...] = ()
) -> Case:
    """A whole sequence; `variant` is "", "packed", "bidirectional" or "proj"."""
    sizes = {"kind": kind, "T": T, "B": B, "I": I, "H": H, "layers": layers, "variant": variant}
    lengths = lengths_of(sizes)

    def cost(phase: str, itemsize: int) -> Cost:
        directions, P = (2 if variant == "bidirectional" else 1), (H // 2 if variant == "proj" else 0)
        out, tokens = P or H, int(lengths.sum())
        widths = [I] + [out * directions] * (layers - 1)
        weights = sum(directions * (GATES[kind] * H * (width + out) + P * H) for width in widths)
        inputs, outputs, parameters = tokens * I * itemsize, tokens * directions * out * itemsize, weights * itemsize
        if phase == "forward":
            return Cost(2.0 * weights * tokens, inputs + parameters, outputs)
        return Cost(6.0 * weights * tokens, inputs + parameters + outputs, outputs + inputs + parameters)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        module, x, dy = draw(ns, sizes, place)
        packed, train = variant == "packed", phase != "forward"
        inputs: Any = x
        if packed:
            inputs, dy = pack_padded_sequence(x, lengths), pack_padded_sequence(dy, lengths).data
        data = inputs.data if packed else x
        data.requires_grad_(train)
        if packed:
            inputs = inputs._replace(data=data)

        def run() -> dict[str, Any]:
            with torch.set_grad_enabled(train):
                y = module(inputs)[0]
            y = y.data if packed else y
            if not train:
                return {"y": y}
            data.grad = None
            module.zero_grad(set_to_none=True)
            y.backward(dy)
            return {"y": y, "dx": data.grad, **{f"d{n}": p.grad for n, p in module.named_parameters()}}

        return run

    return Case(
        "rnn",
        f"{kind.lower()}/{T}x{B}x{I}x{H}x{layers}" + (f"/{variant}" if variant else ""),
        "rnn",
        ("forward", "forward+backward"),
        cost,
        setup,
        sizes,
        quick=quick,
        exact=B * H * T < 4e6,
    )


def draw_steps(
    ns: SimpleNamespace, sizes: dict[str, Any], place: Place
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The module of ``ns``, the inputs of all steps (T, B, I), and the gradient of the last h (B, H)."""
    T, B, I, H = (sizes[key] for key in "TBIH")
    g = place.generator()
    module = place(getattr(ns.nn, sizes["kind"])(I, H))
    return module, place(torch.randn(T, B, I, generator=g)), place(torch.randn(B, H, generator=g))


def make_steps(
    name: str, kind: str, T: int, B: int, I: int, H: int, phases: tuple[str, ...], quick: tuple[str, ...] = ()
) -> Case:
    """T calls of a cell, or of a layer with one step: what decoding does."""
    sizes = {"kind": kind, "T": T, "B": B, "I": I, "H": H}

    def cost(phase: str, itemsize: int) -> Cost:
        weights, tokens = 4 * H * (I + H), B * T
        reads, writes = (weights + tokens * I) * itemsize, 2 * B * H * itemsize
        # At B = 1 the weights are read again every step, from a cache at best; the floor counts them once.
        if phase == "forward":
            return Cost(2.0 * weights * tokens, reads, writes)
        return Cost(6.0 * weights * tokens, reads, writes + weights * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        module, x, dh = draw_steps(ns, sizes, place)
        train = phase != "forward"

        def forward() -> Any:
            state = None
            for t in range(T):
                if kind == "LSTMCell":
                    state = module(x[t], state)
                else:
                    _, state = module(x[t : t + 1], state)
            return state

        def run() -> dict[str, Any]:
            with torch.set_grad_enabled(train):
                h, c = (s.view(B, H) for s in forward())
            if not train:
                return {"h": h, "c": c}
            module.zero_grad(set_to_none=True)
            h.backward(dh)
            return {"h": h, "c": c, **{f"d{n}": p.grad for n, p in module.named_parameters()}}

        return run

    return Case("rnn", name, "rnn_steps", phases, cost, setup, sizes, quick=quick)


BOTH = ("forward", "forward+backward")
TRAIN = ("forward+backward",)
SIZES = (
    (32, 64, 256, 128, 1),
    (128, 32, 512, 512, 1),
    (128, 32, 512, 512, 2),
    (256, 8, 1024, 1024, 1),
    (100, 1, 256, 256, 1),
    (35, 20, 650, 650, 2),
    (70, 80, 1150, 1150, 1),
)
CASES = [
    *(make("LSTM", *s, quick={0: BOTH, 1: TRAIN}.get(i, ())) for i, s in enumerate(SIZES)),
    *(make(kind, *SIZES[i], quick=TRAIN if i == 0 else ()) for kind in ("GRU", "RNN") for i in (0, 1, 5)),
    *(make("LSTM", *SIZES[1], variant) for variant in ("packed", "bidirectional", "proj")),
    make_steps("lstmcell/128x32x512x512", "LSTMCell", 128, 32, 512, 512, BOTH),
    make_steps("lstm/decode/1x1x512x512", "LSTM", 100, 1, 512, 512, ("forward",), quick=("forward",)),
    make_steps("lstmcell/decode/1x1x512x512", "LSTMCell", 100, 1, 512, 512, ("forward",)),
]


def test_rnn(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
