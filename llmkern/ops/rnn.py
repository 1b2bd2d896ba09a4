"""``llmkern::rnn_forward`` and ``_backward``: one layer, one direction, a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._facts import accumulate_dtype, saved_gates
from .._groups import RNN_PRIMALS, RNNCotangents, RNNInputs, RNNOptions, RNNSaved
from ..reference.rnn import rnn as reference
from ._autograd import (
    KernelFunction,
    differentiating,
    of_present,
    pure,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    takes,
    tangents_of,
    wanted_cotangents,
    zeros_for_none,
)
from ._library import define
from ._rnn_saved import keep, kept

_INPUTS, _COTANGENTS = len(RNNInputs._fields), len(RNNCotangents._fields)


def _forward_fake(inputs: RNNInputs, options: RNNOptions, save: bool) -> tuple[Tensor, ...]:
    x, hx, cx, wide = inputs.x, inputs.hx, inputs.cx, accumulate_dtype(inputs.x.dtype)
    steps, H = x.shape[:-1], cx.shape[-1] if cx is not None and options.mode == "lstm" else hx.shape[-1]
    saved = saved_gates(options.mode, options.clip, options.zoneout)
    sums = 2 * inputs.weight_hh.shape[0] + 2
    return (
        x.new_empty((*steps, hx.shape[-1])),
        torch.empty_like(hx),
        hx.new_empty(0) if cx is None else torch.empty_like(cx),
        x.new_empty((*steps, saved * H) if save and saved else 0),
        x.new_empty((*steps, cx.shape[-1]) if save and cx is not None else 0, dtype=wide),
        x.new_empty((*steps, sums) if save and inputs.norms is not None else 0, dtype=wide),
    )


def _by_want(dx: bool, dstates: bool, dweights: bool) -> list[bool]:
    """For each primal, whether its gradient is meant."""
    return [dx, *[dstates] * 2, *[dweights] * (RNN_PRIMALS - 3)]


def _backward_fake(
    cotangents: RNNCotangents, inputs: RNNInputs, saved: RNNSaved, options: RNNOptions, *wants: bool
) -> tuple[Tensor, ...]:
    pairs = zip(inputs[:RNN_PRIMALS], _by_want(*wants), strict=True)
    return tuple(torch.empty_like(t) if w and t is not None else inputs.x.new_empty(0) for t, w in pairs)


rnn_forward = define(
    "rnn_forward(RNNInputs, RNNOptions, bool save) -> (Tensor y, Tensor hy, Tensor cy, Tensor gates, Tensor cells,"
    " Tensor normed)",
    _forward_fake,
)
rnn_backward = define(
    "rnn_backward(RNNCotangents, RNNInputs, RNNSaved, RNNOptions, bool needs_dx, bool needs_dstates,"
    " bool needs_dweights) -> (Tensor dx, Tensor dhx, Tensor dcx, Tensor dweight_ih, Tensor dweight_hh,"
    " Tensor dbias_ih, Tensor dbias_hh, Tensor dweight_hr, Tensor dpeephole, Tensor dnorms)",
    _backward_fake,
)


class RNNFunction(KernelFunction):
    """(y, hy, cy, cells, gates, normed); the last two are for the backward and have no gradient."""

    @staticmethod
    @takes(RNNInputs, "options", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, options, backend = arguments
        y, hy, cy, gates, cells, normed = rnn_forward(*inputs, *options, True, backend)
        return y, hy, cy, cells, gates, normed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.backend = inputs
        y, _, cy, cells, gates, normed = output
        # Where there is no c, nor is there a direction of it in forward mode.
        ctx.mark_non_differentiable(gates, normed, *(() if tensors[2] is not None else (cy, cells)))
        # Autograd would make zeros for the gates, the largest of all tensors, on every backward.
        ctx.set_materialize_grads(False)
        keep(ctx, tensors, (y, gates, cells, normed))
        # vmap takes the two lists for one.
        ctx.save_for_forward(*tensors, y, gates, cells, normed)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhy: Tensor | None, dcy: Tensor | None, dcells: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        tensors = kept(ctx, lambda *inputs: rnn_forward(*inputs, *ctx.options, True, ctx.backend))
        needs = ctx.needs_input_grad
        hx, cx, y = tensors[1], tensors[2], tensors[-4]
        cotangents = [
            None if like is None else torch.zeros_like(like) if d is None else d.contiguous()
            for d, like in ((dy, y), (dhy, hx), (dcy, cx))
        ]
        wants = (needs[0], needs[1] or needs[2], any(needs[3:RNN_PRIMALS]))
        dcells = None if dcells is None or cx is None else dcells.contiguous()
        grads = RNNBackwardFunction.run(*cotangents, dcells, *tensors, ctx.options, wants, ctx.backend)
        grads = wanted(grads, tensors, needs)
        return *grads, *[None] * (len(needs) - len(grads))

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:_INPUTS]
        outputs = 4 if inputs[2] is not None else 2
        function, primals = reference_of(inputs, ctx.options, outputs)
        moves = reference_jvp(function, primals, tangents_of(tangents, inputs[:RNN_PRIMALS]))
        return *moves, *[None] * (6 - outputs)


class RNNBackwardFunction(KernelFunction):
    """Gradients of the primals; ``wants`` says of which (dx, dstates, dweights). Its own derivatives come from the
    reference, step by step."""

    @staticmethod
    @takes(RNNCotangents, RNNInputs, RNNSaved, "options", "wants", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, options, wants, backend = arguments
        return tuple(rnn_backward(*tensors, *options, *wants, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, (ctx.options, ctx.wants) = inputs[: _COTANGENTS + _INPUTS], inputs[-3:-1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor) -> tuple[Tensor | None, ...]:
        cotangents, inputs = ctx.saved_tensors[:_COTANGENTS], ctx.saved_tensors[_COTANGENTS:]
        directions = tuple(d for d in cotangents if d is not None)
        function, primals = reference_of(inputs, ctx.options, len(directions))
        given = wanted_cotangents(dgrads, inputs[:RNN_PRIMALS])
        dprimals, dcotangents = reference_vjp_vjp(function, primals, directions, given)
        of_primals, of_cotangents = iter(dprimals), iter(dcotangents)
        grads = [None if t is None else next(of_cotangents) for t in cotangents]
        grads += [None if t is None else next(of_primals) for t in inputs[:RNN_PRIMALS]]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        cotangents, inputs = ctx.saved_tensors[:_COTANGENTS], ctx.saved_tensors[_COTANGENTS:]
        directions = tuple(d for d in cotangents if d is not None)
        function, primals = reference_of(inputs, ctx.options, len(directions))

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return reference_vjp(function, tensors[len(directions) :], tensors[: len(directions)])

        here = [t is not None for t in (*cotangents, *inputs[:RNN_PRIMALS])]
        moved = [d for d, present in zip(tangents, here, strict=False) if present]
        everything = (*directions, *primals)
        moves = iter(reference_jvp(gradients, everything, zeros_for_none(moved, everything)))
        full = [next(moves) if present else None for present in here[_COTANGENTS:]]
        # What is not wanted is empty, and so is its direction.
        wanting = _by_want(*ctx.wants)
        nothing = primals[0].new_empty(0)
        return tuple(d if w and d is not None else nothing for w, d in zip(wanting, full, strict=True))


def wanted(grads: Sequence[Tensor | None], inputs: Any, needs: Any) -> list[Tensor | None]:
    """The gradients of the inputs that are there and need one."""
    triples = zip(grads, inputs[:RNN_PRIMALS], needs[:RNN_PRIMALS], strict=True)
    return [g if need and t is not None else None for g, t, need in triples]


def reference_of(inputs: Sequence[Any], options: RNNOptions, outputs: int) -> tuple[Any, tuple[Tensor, ...]]:
    """The first ``outputs`` results of the reference as a function of the tensors that are there, and these."""
    primals, others = inputs[:RNN_PRIMALS], inputs[RNN_PRIMALS:_INPUTS]

    def function(*tensors: Any) -> tuple[Tensor, ...]:
        return reference(RNNInputs(*tensors, *others), options)[:outputs]

    return of_present(function, primals)


def rnn(inputs: RNNInputs, options: RNNOptions, backend: str, cells: bool = False) -> tuple[Tensor, ...]:
    """(y, hy, cy, cells), as :func:`llmkern.reference.rnn`. Without ``cells`` the last may be empty."""
    if backend == "reference" or not inputs.hx.shape[0]:
        function, present = reference_of(inputs, options, 4)
        return function(*present)
    if differentiating(*inputs[:RNN_PRIMALS]):
        y, hy, cy, every = RNNFunction.run(*inputs, options, backend)[:4]
        # Compiled and transformed code keeps y for the backward, and cannot notice that a caller changes it.
        return (y.clone(), hy, cy, every.clone()) if pure() else (y, hy, cy, every)
    y, hy, cy, _, every, _ = rnn_forward(*inputs, *options, cells, backend)
    return y, hy, cy, every
