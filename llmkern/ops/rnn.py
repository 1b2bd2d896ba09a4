"""``llmkern::rnn_forward`` and ``_backward``: one layer, one direction, a whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._autograd import KernelFunction, differentiating, reference_jvp, reference_vjp_vjp, zeros_for_none
from ._library import define

_INPUTS = (
    "Tensor x, Tensor hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? batch_sizes"
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(x: Tensor, hx: Tensor, cx: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, mode, _reverse, save = args
    steps, H = x.shape[:-1], hx.shape[-1] if cx is None else cx.shape[-1]
    lstm = mode == "lstm"
    gates = {"lstm": 4, "gru": 4}.get(mode, 0) * H
    return (
        x.new_empty((*steps, hx.shape[-1])),
        torch.empty_like(hx),
        x.new_empty(0) if cx is None else torch.empty_like(cx),
        x.new_empty((*steps, gates) if save else 0),
        x.new_empty((*steps, H) if save and lstm else 0, dtype=_wide(x)),
    )


def _backward_fake(dy: Tensor, dhy: Tensor, dcy: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *_, needs_dx, needs_dweights = args
    wanted = [needs_dx, True, True, *[needs_dweights] * 5]
    inputs = (x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    return tuple(
        torch.empty_like(t) if w and t is not None else x.new_empty(0) for t, w in zip(inputs, wanted, strict=True)
    )


rnn_forward = define(
    f"rnn_forward({_INPUTS}, str mode, bool reverse, bool save, str backend)"
    " -> (Tensor y, Tensor hy, Tensor cy, Tensor gates, Tensor cells)",
    _forward_fake,
)
rnn_backward = define(
    f"rnn_backward(Tensor dy, Tensor dhy, Tensor? dcy, {_INPUTS}, Tensor y, Tensor gates, Tensor cells, str mode,"
    " bool reverse, bool needs_dx, bool needs_dweights, str backend) -> (Tensor dx, Tensor dhx, Tensor dcx,"
    " Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh, Tensor dweight_hr)",
    _backward_fake,
)


class RNNFunction(KernelFunction):
    """(y, hy, cy, gates, cells); the last two are for the backward and have no gradient."""

    @staticmethod
    def forward(
        x: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None,
        mode: str,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
        return tuple(rnn_forward(x, hx, cx, *weights, batch_sizes, mode, reverse, True, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, mode, reverse, backend = inputs
        ctx.options = (mode, reverse, backend)
        y, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        # Autograd would make zeros for the gates, the largest of all tensors, on every backward.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, cells)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhy: Tensor | None, dcy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        mode, reverse, backend = ctx.options
        needs = ctx.needs_input_grad
        y, hx, cx = tensors[9], tensors[1], tensors[2]
        cotangents = [
            None if like is None else torch.zeros_like(like) if d is None else d.contiguous()
            for d, like in ((dy, y), (dhy, hx), (dcy, cx))
        ]
        grads = RNNBackwardFunction.run(*cotangents, *tensors, mode, reverse, needs[0], any(needs[3:8]), backend)
        return *_wanted(grads, tensors, needs), None, None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        function, primals = _reference(inputs[:9], ctx.options)
        moved = [d for d, t in zip(tangents, inputs[:8], strict=False) if t is not None]
        return *reference_jvp(function, primals, zeros_for_none(moved, primals)), None, None


class RNNBackwardFunction(KernelFunction):
    """Gradients of the eight inputs. Its own derivatives come from the reference, step by step."""

    @staticmethod
    def forward(
        dy: Tensor,
        dhy: Tensor,
        dcy: Tensor | None,
        x: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        mode: str,
        reverse: bool,
        needs_dx: bool,
        needs_dweights: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        inputs = (x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes)
        saved = (y, gates, cells)
        options = (mode, reverse, needs_dx, needs_dweights, backend)
        return tuple(rnn_backward(dy, dhy, dcy, *inputs, *saved, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cotangents, tensors = inputs[:3], inputs[3:12]
        mode, reverse, _, _, backend = inputs[15:]
        ctx.options = (mode, reverse, backend)
        ctx.save_for_backward(*cotangents, *tensors)
        ctx.save_for_forward(*cotangents, *tensors)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor) -> tuple[Tensor | None, ...]:
        cotangents, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        function, primals = _reference(inputs, ctx.options)
        given = [d for d, t in zip(dgrads, inputs[:8], strict=True) if t is not None]
        # A gradient that nobody asked for was empty, and so is what comes back for it.
        given = [d if d.shape == p.shape else torch.zeros_like(p) for d, p in zip(given, primals, strict=True)]
        directions = tuple(d for d in cotangents if d is not None)
        dprimals, dcotangents = reference_vjp_vjp(function, primals, directions, given)
        of_primals, of_cotangents = iter(dprimals), iter(dcotangents)
        grads = [None if t is None else next(of_cotangents) for t in cotangents]
        grads += [None if t is None else next(of_primals) for t in inputs[:8]]
        return *grads, *[None] * 9


def _wanted(grads: tuple[Tensor, ...], inputs: Any, needs: Any) -> list[Tensor | None]:
    """The gradients of the inputs that are there and need one."""
    return [g if need and t is not None else None for g, t, need in zip(grads, inputs, needs, strict=False)]


def _reference(inputs: Any, options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The reference as a function of the tensors that are there, and these tensors."""
    mode, reverse, _ = options
    present = [t is not None for t in inputs[:8]]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        full = [next(remaining) if here else None for here in present]
        outputs = reference.rnn(*full, inputs[8], mode, reverse)  # type: ignore[arg-type,call-arg]
        return outputs if mode == "lstm" else outputs[:2]

    return function, tuple(t for t in inputs[:8] if t is not None)


def rnn(
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, hy, cy), as :func:`llmkern.reference.rnn`; all tensors contiguous."""
    inputs = (x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if backend == "reference":
        return reference.rnn(*inputs, batch_sizes, mode, reverse)
    if differentiating(*inputs):
        return RNNFunction.run(*inputs, batch_sizes, mode, reverse, backend)[:3]
    return rnn_forward(*inputs, batch_sizes, mode, reverse, False, backend)[:3]
