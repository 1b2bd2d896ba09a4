"""Dense optimizer steps. Floor: parameter, gradient and states read once, parameter and states written once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Case, Cost, Run, measure

# The tensors of the language model of bench_model: embedding, two LSTM layers, head.
LM = ((32000, 512), *(((2048, 512), (2048, 512), (2048,), (2048,)) * 2), (32000, 512), (32000,))
STATES = {"SGD": 0, "Adagrad": 1, "Adam": 2, "AdamW": 2}


def _case(optimizer: str, quick: bool = False, **options: Any) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in LM)
    states = STATES[optimizer] + ("momentum" in options)

    def cost(phase: str, itemsize: int) -> Cost:
        return Cost(10.0 * numel, (2 + states) * numel * itemsize, (1 + states) * numel * itemsize)

    def setup(ns: SimpleNamespace, phase: str, device: Any, dtype: Any) -> Any:
        g = torch.Generator().manual_seed(case.seed())
        parameters = [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in LM]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=g).to(device, dtype)
        # torch's fastest way of doing it; ours has one way.
        fused = {"fused": True} if ns.name == "torch" else {}
        stepper = getattr(ns.optim, optimizer)(parameters, lr=1e-3, **options, **fused)

        def run() -> dict[str, Any]:
            stepper.step()
            return {str(i): parameter for i, parameter in enumerate(parameters)}

        return run

    name = f"optim/{optimizer.lower()}/lm" + "".join(f"/{k}={v}" for k, v in options.items())
    case = Case("optim", name, ("step",), cost, setup, {"numel": numel}, dtypes=("fp32",), quick=quick)
    return case


CASES = [_case("Adam", quick=True), _case("AdamW"), _case("SGD", momentum=0.9), _case("Adagrad")]


def test_optim(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
