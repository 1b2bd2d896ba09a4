"""What the tests of optimizers share: parameters, and steps on gradients that depend on the step alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from checks import INTERPRETING, assert_accurate
from torch import Tensor

from llmkern import optim

# A scalar, nothing at all, tails of a vector, a chunk of 32768 and its neighbours; of Triton's, a block and its.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (5, 13))
SHAPES += ((1023,), (1024,), (1025,)) if INTERPRETING else ((32768,), (32769,), (3, 11, 1009))

# Every option that changes a number, alone and with others.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "Adam": (
        {},
        {"lr": 0.1, "betas": (0.8, 0.7), "eps": 1e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "amsgrad": True},
        {"maximize": True, "weight_decay": 0.03, "lr": 0.02},
        {"amsgrad": True, "maximize": True},
        # torch.lerp takes its other branch from a weight of 0.5 on.
        {"betas": (0.3, 0.99)},
        {"betas": (0.0, 0.0)},
        {"lr": 0.0, "weight_decay": 1.0},
    ),
    "SGD": (
        {},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.2},
        {"lr": 0.1, "maximize": True},
    ),
    "Adagrad": (
        {},
        {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1},
        {"initial_accumulator_value": 0.5, "eps": 1e-3},
        {"maximize": True, "weight_decay": 0.1, "lr_decay": 1.0},
    ),
}
OPTIONS["AdamW"] = OPTIONS["Adam"]


def parameters(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def draw(params: list[Tensor], step: int, rounded_to: torch.dtype = torch.float64, scale: float = 1.0) -> None:
    """Gradients that depend on the step alone."""
    for p, drawn in zip(params, _drawn(tuple(p.shape for p in params), step), strict=True):
        p.grad = (scale * drawn).to(rounded_to).to(p.dtype)


@cache
def _drawn(shapes: tuple[torch.Size, ...], step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def values(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    """The parameters, then their states."""
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in (*params, *states)]


def train(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    steps: int,
    first: int = 0,
    rounded_to: torch.dtype = torch.float64,
) -> list[Tensor]:
    for i in range(first, first + steps):
        draw(params, i, rounded_to)
        optimizer.step()
    return values(optimizer, params)


_TORCHS: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}


def compare(name: str, dtype: torch.dtype, steps: int = 4, **options: Any) -> None:
    """Against torch in fp64, by torch's own error in `dtype`."""

    def run(module: Any, wide: torch.dtype) -> list[Tensor]:
        params = [p.detach().to(wide).requires_grad_() for p in parameters(dtype)]
        return train(getattr(module, name)(params, **options), params, steps, rounded_to=dtype)

    # torch's are the same for every backend.
    key = (name, dtype, steps, *options.items())
    if key not in _TORCHS:
        _TORCHS[key] = run(torch.optim, torch.float64), run(torch.optim, dtype)
    ours, (right, own) = run(optim, dtype), _TORCHS[key]
    starts = [float(p.detach().abs().max()) if p.numel() else 0.0 for p in parameters(dtype)]
    for i, (got, want, theirs) in enumerate(zip(ours, right, own, strict=True)):
        # A parameter of few elements may have moved to near zero.
        assert_accurate(got, want.double(), theirs, scale=starts[i] if i < len(starts) else 0.0)
