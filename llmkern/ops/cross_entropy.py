"""``llmkern::cross_entropy_forward`` and ``_backward``: per-row losses of index targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._autograd import (
    KernelFunction,
    differentiating,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    zeros_for_none,
)
from ._library import define


def _rows(logits: Tensor, *width: int) -> Tensor:
    accumulated = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((logits.shape[0], *width), dtype=accumulated)


cross_entropy_forward = define(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? scale, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, float logit_scale, str backend)"
    " -> (Tensor loss, Tensor stats, Tensor dlogits)",
    lambda logits, target, weight, scale, *options: (
        _rows(logits),
        _rows(logits, 2),
        logits.new_empty(0) if scale is None else torch.empty_like(logits),
    ),
)
cross_entropy_backward = define(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor stats,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale, str backend) -> Tensor",
    lambda dloss, logits, *options: torch.empty_like(logits),
)


class CrossEntropyFunction(KernelFunction):
    """(loss, stats, dlogits); ``scale`` is a bet on the gradient of loss, and dlogits what that gradient gives.

    Where the bet is right, the backward returns dlogits and the logits are never read again; where it is wrong (the
    loss was scaled, say), or dlogits was given away already (a second backward), they are recomputed.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        logit_scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale, backend)
        return cross_entropy_forward(logits, target, weight, scale, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, target, weight, ctx.scale, *ctx.options = inputs
        _, stats, dlogits = output
        ctx.bet = dlogits if ctx.scale is not None else None
        ctx.mark_non_differentiable(stats, dlogits)
        # Autograd would make zeros for dlogits, as large as the logits, on every backward.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats)
        ctx.save_for_forward(logits, target, weight)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits, target, weight, stats = ctx.saved_tensors
        if dloss is None:
            dlogits = None
        elif ctx.bet is not None and _won(dloss, ctx.scale):
            dlogits, ctx.bet = ctx.bet, None
        else:
            dlogits = CrossEntropyBackwardFunction.run(dloss.contiguous(), logits, target, weight, stats, *ctx.options)
        return dlogits, None, None, None, *(None for _ in ctx.options)

    @staticmethod
    def tangent(ctx: Any, dlogits: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, target, weight = ctx.saved_tensors[:3]
        return reference_jvp(_losses(target, weight, ctx.options), (logits,), (dlogits,)), None, None


class CrossEntropyBackwardFunction(KernelFunction):
    """dlogits of (dloss, logits). ``stats`` are functions of the logits, and their derivative is counted there."""

    @staticmethod
    def forward(
        dloss: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        logit_scale: float,
        backend: str,
    ) -> Tensor:
        options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale, backend)
        return cross_entropy_backward(dloss, logits, target, weight, stats, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dloss, logits, target, weight, _, *ctx.options = inputs
        ctx.save_for_backward(dloss, logits, target, weight)
        ctx.save_for_forward(dloss, logits, target, weight)

    @staticmethod
    def backward(ctx: Any, ddlogits: Tensor) -> tuple[Tensor | None, ...]:
        dloss, logits, target, weight = ctx.saved_tensors
        losses = _losses(target, weight, ctx.options)
        (dlogits,), (ddloss,) = reference_vjp_vjp(losses, (logits,), (dloss,), (ddlogits,))
        return ddloss, dlogits, None, None, None, *(None for _ in ctx.options)

    @staticmethod
    def tangent(ctx: Any, ddloss: Tensor | None, dlogits: Tensor | None, *_: Any) -> Tensor:
        dloss, logits, target, weight = ctx.saved_tensors
        losses = _losses(target, weight, ctx.options)

        def gradient(dloss: Tensor, logits: Tensor) -> Tensor:
            return reference_vjp(losses, (logits,), dloss)[0]

        primals = (dloss, logits)
        return reference_jvp(gradient, primals, zeros_for_none((ddloss, dlogits), primals))


def _won(dloss: Tensor, scale: Tensor) -> bool:
    """Whether a plain backward (no graph of it, no transform) brought the expected gradient."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return torch.equal(dloss, scale)


def _losses(target: Tensor, weight: Tensor | None, options: Any) -> Any:
    """The reference as a function of the logits alone; ``options`` as the op takes them, backend last."""
    return lambda logits: reference.cross_entropy(logits, target, weight, *options[:-1])


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """Losses (N), in fp32 (fp64 for fp64), of contiguous ``logits`` (N, V) and int64 ``target`` (N).

    ``scale`` (N, of the losses' dtype): the gradient that the losses will most likely get, or None.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if backend == "reference":
        return reference.cross_entropy(logits, target, weight, *options)
    if not differentiating(logits):
        return cross_entropy_forward(logits, target, weight, None, *options, backend)[0]
    # The bet is eager only: a compiler and torch.func see a pure function.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        scale = None
    return CrossEntropyFunction.run(logits, target, weight, scale, *options, backend)[0]
