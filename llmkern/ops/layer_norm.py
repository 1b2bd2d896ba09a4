"""``llmkern::layer_norm_forward`` and ``_backward``: rows with mean 0 and deviation 1, times weight, plus bias; and the
root-mean-square form, which leaves the mean where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._facts import accumulate_dtype
from ..reference.layer_norm import layer_norm as reference
from ._autograd import (
    KernelFunction,
    differentiating,
    of_present,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    tangents_of,
    wanted_cotangents,
    zeros_for_none,
)
from ._library import define


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2), dtype=accumulate_dtype(x.dtype))


def _backward_fake(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, wants: int
) -> tuple[Tensor, ...]:
    primals = enumerate((x, weight, bias))
    return tuple(dy.new_empty(0) if t is None or not wants >> k & 1 else t.new_empty(t.shape) for k, t in primals)


# stats (N, 2), in the accumulation dtype: each row's mean (0 with rms) and 1 / deviation.
layer_norm_forward = define(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms) -> (Tensor y, Tensor stats)",
    _forward_fake,
)
# The k-th gradient is an empty tensor unless bit k of `wants` is set.
layer_norm_backward = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, float eps, bool rms,"
    " int wants) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
)


class LayerNormFunction(KernelFunction):
    """(y, stats); the second is for the backward, and has no gradient."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        return layer_norm_forward(x, weight, bias, eps, rms, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.eps, ctx.rms, ctx.backend = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.save_for_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        needs = ctx.needs_input_grad[:3]
        x, weight, bias, stats = ctx.saved_tensors
        wants = sum(need << k for k, need in enumerate(needs))
        grads = LayerNormBackwardFunction.run(
            dy.contiguous(), x, stats, weight, bias, ctx.eps, ctx.rms, wants, ctx.backend
        )
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        function, primals = _reference(ctx.saved_tensors[:3], ctx.eps, ctx.rms)
        return reference_jvp(function, primals, tangents_of(tangents, ctx.saved_tensors[:3])), None


class LayerNormBackwardFunction(KernelFunction):
    """dx, dweight and dbias; bit k of ``wants`` says whether the k-th."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        stats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        wants: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return layer_norm_backward(dy, x, stats, weight, bias, eps, rms, wants, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        dy, x, _, weight, bias, ctx.eps, ctx.rms, ctx.wants, _ = inputs
        ctx.save_for_backward(dy, x, weight, bias)
        ctx.save_for_forward(dy, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor) -> tuple[Tensor | None, ...]:
        dy, *inputs = ctx.saved_tensors
        function, primals = _reference(inputs, ctx.eps, ctx.rms)
        dprimals, (ddy,) = reference_vjp_vjp(function, primals, (dy,), wanted_cotangents(dgrads, inputs))
        found = iter(dprimals)
        dx, dweight, dbias = (None if t is None else next(found) for t in inputs)
        return ddy, dx, None, dweight, dbias, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, ddy: Tensor | None, dx: Tensor | None, _: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dy, *inputs = ctx.saved_tensors
        function, primals = _reference(inputs, ctx.eps, ctx.rms)

        def gradients(dy: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
            return reference_vjp(function, primals, dy)

        moves = (*zeros_for_none((ddy,), (dy,)), *tangents_of((dx, *tangents), inputs))
        found = iter(reference_jvp(gradients, (dy, *primals), moves))
        every = [dy.new_zeros(0) if t is None else next(found) for t in inputs]
        return tuple(move if ctx.wants >> k & 1 else dy.new_zeros(0) for k, move in enumerate(every))


def _reference(
    inputs: Sequence[Tensor | None], eps: float, rms: bool
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The reference as a function of x, weight and bias, as far as they are there, and these."""
    return of_present(lambda x, weight, bias: reference(x, weight, bias, eps, rms), inputs)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, backend: str) -> Tensor:
    """(N, D), as :func:`llmkern.reference.layer_norm`, of contiguous ``x`` (N, D), ``weight`` (D) and ``bias`` (D).
    These two are of one dtype: x's, or float32 where x has half of it."""
    if backend == "reference":
        return reference(x, weight, bias, eps, rms)
    if not differentiating(x, weight, bias):
        return layer_norm_forward(x, weight, bias, eps, rms, backend)[0]
    return LayerNormFunction.run(x, weight, bias, eps, rms, backend)[0]
