"""``llmkern::rnn_forward`` and ``_backward``: one layer, one direction, a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._facts import accumulate_dtype, saved_gates
from ._autograd import (
    KernelFunction,
    differentiating,
    pure,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    zeros_for_none,
)
from ._library import define
from ._rnn_saved import keep, kept


class Options(NamedTuple):
    """What a layer does; see :mod:`llmkern.reference.rnn`. What becomes a graph draws its seed there: an op takes it as
    a tensor, ``drawn``."""

    mode: str
    reverse: bool = False
    batch_first: bool = False
    clip: float = 0.0
    zoneout: float = 0.0
    zoneout_cell: float = 0.0
    seed: int = -1


_INPUTS = (
    "Tensor x, Tensor hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? peephole, Tensor? norms, Tensor? batch_sizes, Tensor? drawn"
)
_OPTIONS = "str mode, bool reverse, bool batch_first, float clip, float zoneout, float zoneout_cell, int seed"
# Of the inputs, those that can have a gradient.
_PRIMALS = 10
_INPUT_COUNT = 12


def _forward_fake(x: Tensor, hx: Tensor, cx: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    weight_hh, norms, options, save = args[1], args[6], Options(*args[-8:-1]), args[-1]
    steps, H = x.shape[:-1], cx.shape[-1] if cx is not None and options.mode == "lstm" else hx.shape[-1]
    saved, wide = saved_gates(options.mode, options.clip, options.zoneout), accumulate_dtype(x.dtype)
    return (
        x.new_empty((*steps, hx.shape[-1])),
        torch.empty_like(hx),
        hx.new_empty(0) if cx is None else torch.empty_like(cx),
        x.new_empty((*steps, saved * H) if save and saved else 0),
        x.new_empty((*steps, cx.shape[-1]) if save and cx is not None else 0, dtype=wide),
        x.new_empty((*steps, 2 * weight_hh.shape[0] + 2) if save and norms is not None else 0, dtype=wide),
    )


def _by_want(wants: Sequence[bool]) -> list[bool]:
    """Which primals are meant by (dx, dstates, dweights)."""
    dx, dstates, dweights = wants
    return [dx, *[dstates] * 2, *[dweights] * 7]


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, wanted = args[4 : 4 + _PRIMALS], _by_want(args[-3:])
    x = inputs[0]
    return tuple(
        torch.empty_like(t) if w and t is not None else x.new_empty(0) for t, w in zip(inputs, wanted, strict=True)
    )


def _with_number(args: tuple[Any, ...], drawn: int, seed: int) -> list[Any]:
    """A backend's arguments: the seed is a number, be it drawn by a graph. Behind are the places of both."""
    arguments = list(args)
    if arguments[drawn] is not None:
        arguments[seed] = int(arguments[drawn])
    del arguments[drawn]
    return arguments


rnn_forward = define(
    f"rnn_forward({_INPUTS}, {_OPTIONS}, bool save)"
    " -> (Tensor y, Tensor hy, Tensor cy, Tensor gates, Tensor cells, Tensor normed)",
    _forward_fake,
    lambda *args: _with_number(args, _INPUT_COUNT - 1, -2),
)
rnn_backward = define(
    f"rnn_backward(Tensor dy, Tensor dhy, Tensor? dcy, Tensor? dcells, {_INPUTS}, Tensor y, Tensor gates, Tensor cells,"
    f" Tensor normed, {_OPTIONS}, bool needs_dx, bool needs_dstates, bool needs_dweights) -> (Tensor dx,"
    " Tensor dhx, Tensor dcx, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh,"
    " Tensor dweight_hr, Tensor dpeephole, Tensor dnorms)",
    _backward_fake,
    lambda *args: _with_number(args, 4 + _INPUT_COUNT - 1, -4),
)


class RNNFunction(KernelFunction):
    """(y, hy, cy, cells, gates, normed); the last two are for the backward and have no gradient.

    The compiler takes a `forward` of as many parameters as there are arguments only, so they are spelled out.
    """

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
        peephole: Tensor | None,
        norms: Tensor | None,
        batch_sizes: Tensor | None,
        drawn: Tensor | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, ...]:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms)
        y, hy, cy, gates, cells, normed = rnn_forward(x, hx, cx, *weights, batch_sizes, drawn, *options, True, backend)
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
        wants = (needs[0], needs[1] or needs[2], any(needs[3:_PRIMALS]))
        dcells = None if dcells is None or cx is None else dcells.contiguous()
        grads = RNNBackwardFunction.run(*cotangents, dcells, *tensors, ctx.options, wants, ctx.backend)
        return *wanted(grads, tensors, needs), *[None] * 4

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:_INPUT_COUNT]
        outputs = 4 if inputs[2] is not None else 2
        function, primals = reference_of(inputs, ctx.options, outputs)
        moved = [d for d, t in zip(tangents, inputs[:_PRIMALS], strict=False) if t is not None]
        moves = reference_jvp(function, primals, zeros_for_none(moved, primals))
        return *moves, *[None] * (6 - outputs)


class RNNBackwardFunction(KernelFunction):
    """Gradients of the ten primals; ``wants`` says of which (dx, dstates, dweights). Its own derivatives come from the
    reference, step by step."""

    @staticmethod
    def forward(
        dy: Tensor,
        dhy: Tensor,
        dcy: Tensor | None,
        dcells: Tensor | None,
        x: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        peephole: Tensor | None,
        norms: Tensor | None,
        batch_sizes: Tensor | None,
        drawn: Tensor | None,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        normed: Tensor,
        options: Options,
        wants: tuple[bool, bool, bool],
        backend: str,
    ) -> tuple[Tensor, ...]:
        inputs = (x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms)
        saved = (y, gates, cells, normed)
        return tuple(rnn_backward(dy, dhy, dcy, dcells, *inputs, batch_sizes, drawn, *saved, *options, *wants, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, (ctx.options, ctx.wants) = inputs[: 4 + _INPUT_COUNT], inputs[-3:-1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor) -> tuple[Tensor | None, ...]:
        cotangents, inputs = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        directions = tuple(d for d in cotangents if d is not None)
        function, primals = reference_of(inputs, ctx.options, len(directions))
        given = [d for d, t in zip(dgrads, inputs[:_PRIMALS], strict=True) if t is not None]
        # A gradient that nobody asked for was empty, and so is what comes back for it.
        given = [d if d.shape == p.shape else torch.zeros_like(p) for d, p in zip(given, primals, strict=True)]
        dprimals, dcotangents = reference_vjp_vjp(function, primals, directions, given)
        of_primals, of_cotangents = iter(dprimals), iter(dcotangents)
        grads = [None if t is None else next(of_cotangents) for t in cotangents]
        grads += [None if t is None else next(of_primals) for t in inputs[:_PRIMALS]]
        return *grads, *[None] * 9

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        cotangents, inputs = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        directions = tuple(d for d in cotangents if d is not None)
        function, primals = reference_of(inputs, ctx.options, len(directions))

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return reference_vjp(function, tensors[len(directions) :], tensors[: len(directions)])

        here = [t is not None for t in (*cotangents, *inputs[:_PRIMALS])]
        moved = [d for d, present in zip(tangents, here, strict=False) if present]
        everything = (*directions, *primals)
        moves = iter(reference_jvp(gradients, everything, zeros_for_none(moved, everything)))
        full = [next(moves) if present else None for present in here[4:]]
        # What is not wanted is empty, and so is its direction.
        wanting = _by_want(ctx.wants)
        nothing = primals[0].new_empty(0)
        return tuple(d if w and d is not None else nothing for w, d in zip(wanting, full, strict=True))


def wanted(grads: Sequence[Tensor | None], inputs: Any, needs: Any) -> list[Tensor | None]:
    """The gradients of the inputs that are there and need one."""
    triples = zip(grads, inputs[:_PRIMALS], needs[:_PRIMALS], strict=True)
    return [g if need and t is not None else None for g, t, need in triples]


def reference_of(inputs: Any, options: Options, outputs: int) -> tuple[Any, tuple[Tensor, ...]]:
    """The first ``outputs`` results of the reference as a function of the tensors that are there, and these."""
    present = [t is not None for t in inputs[:_PRIMALS]]
    batch_sizes, drawn = inputs[_PRIMALS:_INPUT_COUNT]
    *settings, seed = options if drawn is None else options._replace(seed=drawn)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        full = [next(remaining) if here else None for here in present]
        return reference.rnn(*full, batch_sizes, *settings, seed)[:outputs]  # type: ignore[arg-type,call-arg]

    return function, tuple(t for t in inputs[:_PRIMALS] if t is not None)


def rnn(
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norms: Tensor | None,
    batch_sizes: Tensor | None,
    options: Options,
    backend: str,
    cells: bool = False,
    drawn: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, hy, cy, cells), as :func:`llmkern.reference.rnn`; all tensors contiguous. Without ``cells`` the last may be
    empty. ``drawn``: see :class:`Options`."""
    primals = (x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms)
    inputs = (*primals, batch_sizes, drawn)
    if backend == "reference" or not hx.shape[0]:
        function, present = reference_of(inputs, options, 4)
        return function(*present)
    if differentiating(*primals):
        y, hy, cy, every = RNNFunction.run(*inputs, options, backend)[:4]
        # Compiled and transformed code keeps y for the backward, and cannot notice that a caller changes it.
        return (y.clone(), hy, cy, every.clone()) if pure() else (y, hy, cy, every)
    y, hy, cy, _, every, _ = rnn_forward(*inputs, *options, cells, backend)
    return y, hy, cy, every
