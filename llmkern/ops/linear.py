"""``llmkern::linear_forward`` and ``_backward``: y = x W^T + b, and its two large products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._torch import F
from ..reference.linear import linear as reference
from ._autograd import KernelFunction, differentiating, pure, zeros_for_none
from ._library import define

linear_forward = define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
)
# A gradient that is not needed comes back as an empty tensor.
linear_backward = define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    lambda dy, x, weight, need_x, need_weight: (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
    ),
)


class LinearFunction(KernelFunction):
    """y = x W^T + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return linear_forward(x, weight, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.backend = inputs
        ctx.save_for_forward(x, weight)
        if pure():
            ctx.save_for_backward(x, weight)
        else:
            # What no gradient reads may change, and need not be kept.
            need_x, need_weight = ctx.needs_input_grad[:2]
            ctx.save_for_backward(x if need_weight else None, weight if need_x else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dweight = None
        if need_x or need_weight:
            dy, (x, weight) = dy.contiguous(), ctx.saved_tensors
            x = dy.new_empty((dy.shape[0], weight.shape[1])) if x is None else x
            weight = dy.new_empty((dy.shape[1], x.shape[1])) if weight is None else weight
            dx, dweight = LinearBackwardFunction.run(dy, x, weight, need_x, need_weight, ctx.backend)
        return dx if need_x else None, dweight if need_weight else None, dy.sum(0) if need_bias else None, None

    @staticmethod
    def tangent(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Tensor:
        x, weight = ctx.saved_tensors
        dx, dweight = zeros_for_none((dx, dweight), (x, weight))
        return F.linear(dx, weight, dbias) + F.linear(x, dweight)


class LinearBackwardFunction(KernelFunction):
    """dx = dy W and dW = dy^T x: products again, and so are their derivatives."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        return linear_backward(dy, x, weight, need_x, need_weight, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dy, x, weight, ctx.need_x, ctx.need_weight, _ = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.save_for_forward(dy, x, weight)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddweight: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, weight = ctx.saved_tensors
        ddy = dy.new_zeros(dy.shape)
        dx = dweight = None
        if ctx.need_x:
            ddy, dweight = ddy + F.linear(ddx, weight), dy.t() @ ddx
        if ctx.need_weight:
            ddy, dx = ddy + F.linear(x, ddweight), dy @ ddweight
        return ddy, dx, dweight, None, None, None

    @staticmethod
    def tangent(
        ctx: Any, ddy: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        dy, x, weight = ctx.saved_tensors
        ddy, dx, dweight = zeros_for_none((ddy, dx, dweight), (dy, x, weight))
        nothing = x.new_zeros((0,))
        return (
            ddy @ weight + dy @ dweight if ctx.need_x else nothing,
            ddy.t() @ x + dy.t() @ dx if ctx.need_weight else nothing,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """y (N, O) of contiguous ``x`` (N, I), ``weight`` (O, I) and ``bias`` (O)."""
    if backend == "reference":
        return reference(x, weight, bias)
    if not differentiating(x, weight, bias):
        return linear_forward(x, weight, bias, backend)
    return LinearFunction.run(x, weight, bias, backend)
