"""``llmkern::dropout_forward``: a mask that is a function of a seed, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.dropout import dropout as reference
from ._autograd import KernelFunction, differentiating
from ._library import define

dropout_forward = define("dropout_forward(Tensor x, float p, int seed) -> Tensor", lambda x, *_: x.new_empty(x.shape))


class DropoutFunction(KernelFunction):
    """Linear in x, and its own transpose: every derivative is the same function of something else."""

    @staticmethod
    def forward(x: Tensor, p: float, seed: int, backend: str) -> Tensor:
        return dropout_forward(x, p, seed, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return DropoutFunction.run(dy.contiguous(), *ctx.options), None, None, None

    @staticmethod
    def tangent(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        return DropoutFunction.run(dx.contiguous(), *ctx.options)


def dropout(x: Tensor, p: float, seed: int, backend: str) -> Tensor:
    """x / (1 - p) where an element is kept, else 0; it is dropped with probability ``p``, by ``seed`` and its index."""
    x = x.contiguous()
    if backend == "reference":
        return reference(x, p, seed)
    if differentiating(x):
        return DropoutFunction.run(x, p, seed, backend)
    return dropout_forward(x, p, seed, backend)
