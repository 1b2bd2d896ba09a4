"""``llmkern::mse_loss_forward`` and ``_backward``: squared errors, or their sum, and 2 * (x - t) * g."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._facts import accumulate_dtype
from ..reference.mse_loss import mse_loss as reference
from ._autograd import KernelFunction, differentiating, plain_backward, pure
from ._library import define


def _gradients(input: Tensor, need_input: bool, need_target: bool) -> tuple[Tensor, Tensor]:
    """A gradient that is not needed is an empty tensor."""
    return input.new_empty(input.shape if need_input else (0,)), input.new_empty(input.shape if need_target else (0,))


# For a sum that will get the gradient `scale`, what is needed of the operands' gradients is written in the same pass.
mse_loss_forward = define(
    "mse_loss_forward(Tensor input, Tensor target, bool reduce, Tensor? scale, bool need_input, bool need_target)"
    " -> (Tensor loss, Tensor dinput, Tensor dtarget)",
    lambda input, target, reduce, scale, need_input, need_target: (
        input.new_empty((), dtype=accumulate_dtype(input.dtype)) if reduce else input.new_empty(input.shape),
        *_gradients(input, need_input, need_target),
    ),
)
mse_loss_backward = define(
    "mse_loss_backward(Tensor dloss, Tensor input, Tensor target, bool reduce, bool need_input,"
    " bool need_target) -> (Tensor dinput, Tensor dtarget)",
    lambda dloss, input, target, reduce, need_input, need_target: _gradients(input, need_input, need_target),
)


def _usable(
    gradients: tuple[Tensor, Tensor], dloss: Tensor, scale: Tensor, input: Tensor, target: Tensor, backend: str
) -> bool:
    """Whether the precomputed gradients may be handed out. A GPU's kernel compares what came with what was expected,
    and corrects them: the host would have to wait for the number."""
    if not plain_backward(dloss):
        return False
    correct = getattr(dispatch.load(backend), "mse_loss_correct_", None)
    if correct is None:
        return torch.equal(dloss, scale)
    correct(dloss, scale, input, target, *gradients)
    return True


def _twice_dot(a: Tensor, b: Tensor, reduce: bool) -> Tensor:
    """2 * a * b: each, or their sum in the accumulation dtype."""
    product = 2 * a.to(accumulate_dtype(a.dtype)) * b
    return product.sum() if reduce else product.to(a.dtype)


class MseLossFunction(KernelFunction):
    """(loss, dinput, dtarget), loss = (input - target)^2, or its sum.

    ``scale`` is the gradient that the sum will most likely get, and dinput and dtarget what it gives. Where it is
    right, the backward returns them and no operand is read again; where it is wrong (the loss was scaled, say), or
    they were given away already (a second backward), they are computed anew.
    """

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        reduce: bool,
        scale: Tensor | None,
        need_input: bool,
        need_target: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return mse_loss_forward(input, target, reduce, scale, need_input, need_target, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, target, ctx.reduce, ctx.scale, _, _, ctx.backend = inputs
        _, dinput, dtarget = output
        ctx.precomputed = (dinput, dtarget) if ctx.scale is not None else None
        ctx.mark_non_differentiable(dinput, dtarget)
        # Autograd would make zeros for dinput and dtarget, as large as the operands, on every backward.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target)
        ctx.save_for_forward(input, target)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors
        need_input, need_target = ctx.needs_input_grad[:2]
        # What is of no use is freed before the recomputation needs as much memory again.
        gradients, ctx.precomputed = ctx.precomputed, None
        if dloss is None:
            return (None,) * 7
        if gradients is None or not _usable(gradients, dloss, ctx.scale, input, target, ctx.backend):
            gradients = None
            gradients = MseLossBackwardFunction.run(
                dloss.contiguous(), input, target, ctx.reduce, need_input, need_target, ctx.backend
            )
        dinput, dtarget = gradients
        return dinput if need_input else None, dtarget if need_target else None, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, dinput: Tensor | None, dtarget: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors
        return _twice_dot(input - target, _difference(dinput, dtarget), ctx.reduce), None, None


class MseLossBackwardFunction(KernelFunction):
    """dinput = 2 * (input - target) * dloss, dtarget = -dinput."""

    @staticmethod
    def forward(
        dloss: Tensor,
        input: Tensor,
        target: Tensor,
        reduce: bool,
        need_input: bool,
        need_target: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return mse_loss_backward(dloss, input, target, reduce, need_input, need_target, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dloss, input, target, ctx.reduce, ctx.need_input, ctx.need_target, _ = inputs
        ctx.save_for_backward(dloss, input, target)
        ctx.save_for_forward(dloss, input, target)

    @staticmethod
    def backward(ctx: Any, ddinput: Tensor, ddtarget: Tensor) -> tuple[Tensor | None, ...]:
        dloss, input, target = ctx.saved_tensors
        cotangent = _difference(ddinput if ctx.need_input else None, ddtarget if ctx.need_target else None)
        ddloss = _twice_dot(input - target, cotangent, ctx.reduce)
        dinput = (2 * cotangent * dloss).to(input.dtype)
        return ddloss, dinput, -dinput, None, None, None, None

    @staticmethod
    def tangent(
        ctx: Any, ddloss: Tensor | None, dinput: Tensor | None, dtarget: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        dloss, input, target = ctx.saved_tensors
        result = torch.zeros_like(input)
        if ddloss is not None:
            result = result + 2 * (input - target) * ddloss
        if dinput is not None or dtarget is not None:
            result = result + 2 * _difference(dinput, dtarget) * dloss
        result = result.to(input.dtype)
        nothing = input.new_zeros((0,))
        return result if ctx.need_input else nothing, -result if ctx.need_target else nothing


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor:
    """a - b, where a missing one counts as zero."""
    if a is None:
        assert b is not None
        return -b
    return a if b is None else a - b


def mse_loss(
    input: Tensor, target: Tensor, reduce: bool, weight: Tensor | None, scale: Tensor | None, backend: str
) -> Tensor:
    """Squared errors of two contiguous tensors of one shape, or with ``reduce`` their sum, in fp32 or fp64.

    ``scale`` (), of the sum's dtype: the gradient that the sum will most likely get, or None. No kernel takes a
    ``weight`` (dispatch says so); the reference does.
    """
    if backend == "reference":
        return reference(input, target, reduce, weight)
    if not differentiating(input, target):
        return mse_loss_forward(input, target, reduce, None, False, False, backend)[0]
    # Eager only: a compiler and torch.func see a pure function.
    if pure():
        scale = None
    need_input, need_target = (scale is not None and t.requires_grad for t in (input, target))
    return MseLossFunction.run(input, target, reduce, scale, need_input, need_target, backend)[0]
