"""Dense optimizer steps. Floor: parameter, gradient and states read once, parameter and states written once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure

# The tensors of the language model of bench_model: embedding, two LSTM layers, head.
LM = ((32000, 512), *(((2048, 512), (2048, 512), (2048,), (2048,)) * 2), (32000, 512), (32000,))
STATES = {"SGD": 0, "Adagrad": 1, "Adam": 2, "AdamW": 2}


def draw(shapes: tuple[tuple[int, ...], ...], place: Place) -> list[torch.Tensor]:
    """Parameters with their gradients."""
    g = place.generator()
    parameters = [place(torch.randn(shape, generator=g)).requires_grad_() for shape in shapes]
    for parameter in parameters:
        parameter.grad = place(torch.randn(parameter.shape, generator=g))
    return parameters


def make(optimizer: str, shapes: tuple[tuple[int, ...], ...] = LM, quick: tuple[str, ...] = (), **options: Any) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    sizes = {"optimizer": optimizer, "shapes": shapes, **options}
    states = STATES[optimizer] + ("momentum" in options)

    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(10.0 * numel, (2 + states) * numel * itemsize, (1 + states) * numel * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        parameters = draw(shapes, place)
        # torch's fastest way of doing it; ours has one way.
        fused = {"fused": True} if ns.name == "torch" else {}
        stepper = getattr(ns.optim, optimizer)(parameters, lr=1e-3, **options, **fused)

        def run() -> dict[str, Any]:
            stepper.step()
            return {str(i): parameter for i, parameter in enumerate(parameters)}

        return run

    name = f"optim/{optimizer.lower()}/lm" + "".join(f"/{k}={v}" for k, v in options.items())
    return Case("optim", name, "optim", ("step",), cost, setup, sizes, quick=quick, exact=numel < 1e7)


CASES = [make("Adam", quick=("step",)), make("AdamW"), make("SGD", momentum=0.9), make("Adagrad")]


def test_optim(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
