"""``llmkern::mse_loss_forward`` and ``_backward``: squared errors, or their sum, and 2 * (x - t) * g."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._autograd import KernelFunction, differentiating
from ._library import define


def _sum_dtype(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


mse_loss_forward = define(
    "mse_loss_forward(Tensor input, Tensor target, bool reduce, str backend) -> Tensor",
    lambda input, target, reduce: (
        input.new_empty((), dtype=_sum_dtype(input)) if reduce else input.new_empty(input.shape)
    ),
)
# A gradient that is not needed comes back as an empty tensor.
mse_loss_backward = define(
    "mse_loss_backward(Tensor dloss, Tensor input, Tensor target, bool reduce, bool need_input,"
    " bool need_target, str backend) -> (Tensor, Tensor)",
    lambda dloss, input, target, reduce, need_input, need_target: (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(input.shape if need_target else (0,)),
    ),
)


def _twice_dot(a: Tensor, b: Tensor, reduce: bool) -> Tensor:
    """2 * a * b: each, or their sum in the accumulation dtype."""
    product = 2 * a.to(_sum_dtype(a)) * b
    return product.sum() if reduce else product.to(a.dtype)


class MseLossFunction(KernelFunction):
    """loss = (input - target)^2, or its sum."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, reduce: bool, backend: str) -> Tensor:
        return mse_loss_forward(input, target, reduce, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, ctx.reduce, ctx.backend = inputs
        ctx.save_for_backward(input, target)
        ctx.save_for_forward(input, target)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        need_input, need_target = ctx.needs_input_grad[:2]
        dinput, dtarget = MseLossBackwardFunction.run(
            dloss.contiguous(), *ctx.saved_tensors, ctx.reduce, need_input, need_target, ctx.backend
        )
        return dinput if need_input else None, dtarget if need_target else None, None, None

    @staticmethod
    def tangent(ctx: Any, dinput: Tensor | None, dtarget: Tensor | None, *_: None) -> Tensor:
        input, target = ctx.saved_tensors
        return _twice_dot(input - target, _difference(dinput, dtarget), ctx.reduce)


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


def mse_loss(input: Tensor, target: Tensor, reduce: bool, weight: Tensor | None, backend: str) -> Tensor:
    """Squared errors of two contiguous tensors of one shape, or with ``reduce`` their sum, in fp32 or fp64.

    No kernel takes a ``weight`` (dispatch says so); the reference does.
    """
    if backend == "reference":
        return reference.mse_loss(input, target, reduce, weight)
    if not differentiating(input, target):
        return mse_loss_forward(input, target, reduce, backend)
    return MseLossFunction.run(input, target, reduce, backend)
