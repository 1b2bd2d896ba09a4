"""Derivatives of kernels beyond the first, through the differentiable reference.

A kernel gives a forward and a backward. Whoever differentiates a backward again, or asks for a forward-mode
derivative, gets it from the pure-PyTorch reference: right, and at the reference's cost. ``torch.func.vjp`` is used
rather than ``autograd.grad`` because it works under ``torch.func`` transforms too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import Parameter, Signature
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from .._graphs import exporter


def differentiating(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors may be differentiated; if not, the kernel runs without an autograd node."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def pure() -> bool:
    """Whether a compiler or a transform takes the call for a pure function: nothing may be kept beside its results."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def seed_freezes() -> bool:
    """Whether a number that is drawn now would be that of all later runs too, which are replays of this one: compiled,
    transformed, traced, seen by a dispatch mode, or captured by a CUDA graph."""
    return pure() or exporter() is not None or torch._C._len_torch_dispatch_stack() > 0 or capturing()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def traced(tensor: Tensor) -> bool:
    """Whether a call on this tensor is more than plain eager autograd: compiled, transformed, or in forward mode."""
    return pure() or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None)


def plain_backward(*cotangents: Tensor | None) -> bool:
    """Whether a backward is a plain one: no graph of it, no transform, no batch of them
    (``autograd.grad(..., is_grads_batched=True)``). Others may not get a gradient that a forward has precomputed."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return not any(torch._C._functorch.is_legacy_batchedtensor(d) for d in cotangents if d is not None)


def keeps_graph() -> bool:
    """Whether the backward that runs may be followed by another one through the same graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def as_shape(result: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous result in another shape, for a caller who may change it in place: no view if it is made without grad
    mode, as autograd refuses to change such a view once grad mode is on."""
    if result.shape == shape:
        return result
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return result.view(shape)
    return torch.ops.aten._unsafe_view(result, shape)


class KernelFunction(Function):
    """An ``autograd.Function`` over ops, for eager, compiled and ``torch.func`` use: call :meth:`run`, not ``apply``.

    Subclasses give ``forward(*inputs)``, ``setup_context``, ``backward`` and, in place of ``jvp``, ``tangent``.
    No one form serves all three uses: the compiler refuses a Function with a ``jvp``, ``torch.func`` demands a
    separate ``setup_context``, and that costs 60 us a call in eager mode. :meth:`run` takes the form that fits.
    """

    generate_vmap_rule = True

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def run(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return cls.apply(*_distinct(args))
        if torch._C._are_functorch_transforms_active():
            return _transformed(cls).apply(*(_Whole(arg) if isinstance(arg, tuple) else arg for arg in args))
        return _eager(cls).apply(*args)


def takes(*parts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a ``forward(*arguments)`` of a function: names of its arguments, and groups of them (``_groups.py``, or
    tuples of names). The compiler counts them."""
    every = [[part] if isinstance(part, str) else getattr(part, "_fields", part) for part in parts]
    names = [name for part in every for name in part]

    def named(forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = Signature([Parameter(name, Parameter.POSITIONAL_ONLY) for name in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    return named


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """The compiler takes no tensor twice in one call (h as c, tied weights, a target that is the input): from the
    second time on it comes as a view of itself, and autograd adds the gradients of both."""
    result: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, Tensor) and any(arg is other for other in result)
        result.append(arg.view_as(arg) if repeated else arg)
    return result


class _Whole:
    """A tuple that ``torch.func``, which looks for tensors in all arguments, takes for one argument."""

    def __init__(self, value: tuple[Any, ...]) -> None:
        self.value = value

    @staticmethod
    def bare(args: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(arg.value if isinstance(arg, _Whole) else arg for arg in args)


@cache
def _transformed(function: type[KernelFunction]) -> type[Function]:
    def forward(*args: Any) -> Any:
        return function.forward(*_Whole.bare(args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.setup_context(ctx, _Whole.bare(inputs), output)

    methods = {"forward": forward, "setup_context": setup_context, "jvp": function.tangent}
    return type(function.__name__, (function,), {name: staticmethod(f) for name, f in methods.items()})


@cache
def _eager(function: type[KernelFunction]) -> type[Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": forward, "backward": function.backward, "jvp": function.tangent}
    return type(function.__name__, (Function,), {name: staticmethod(f) for name, f in methods.items()})


def reference_vjp(function: Callable[..., Any], primals: Sequence[Tensor], cotangents: Any) -> tuple[Tensor, ...]:
    """The gradients of ``function`` at ``primals``, differentiable in primals and cotangents."""
    pullback = torch.func.vjp(function, *primals)[1]
    return pullback(cotangents)


def reference_vjp_vjp(
    function: Callable[..., Any],
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    dgrads: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The backward of a backward: cotangents ``dgrads`` on the gradients give those on primals and cotangents.

    ``function`` returns as many tensors as there are cotangents: a tensor for one, a tuple for several.
    """

    def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        points, directions = arguments[: len(primals)], arguments[len(primals) :]
        return reference_vjp(function, points, directions[0] if len(directions) == 1 else tuple(directions))

    results = reference_vjp(gradients, (*primals, *cotangents), tuple(dgrads))
    return results[: len(primals)], results[len(primals) :]


def reference_jvp(function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    """The directional derivative of ``function``, as the transpose of its (linear) pullback."""
    outputs, pullback = torch.func.vjp(function, *primals)[:2]
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, outputs)
    transpose = torch.func.vjp(pullback, zeros)[1]
    return transpose(tuple(tangents))[0]


def of_present(
    function: Callable[..., Any], primals: Sequence[Tensor | None]
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """``function`` of all ``primals``, some of which may be None, as a function of those that are there; and these."""

    def of_these(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return function(*[None if t is None else next(remaining) for t in primals])

    return of_these, tuple(t for t in primals if t is not None)


def tangents_of(tangents: Sequence[Tensor | None], primals: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the primals that are there, with zeros in place of None."""
    pairs = [(d, t) for d, t in zip(tangents, primals, strict=False) if t is not None]
    return zeros_for_none([d for d, _ in pairs], [t for _, t in pairs])


def wanted_cotangents(dgrads: Sequence[Tensor], primals: Sequence[Tensor | None]) -> list[Tensor]:
    """Cotangents on the gradients of the primals that are there. A gradient that nobody asked for was empty, and so is
    what comes back for it: zeros."""
    pairs = [(d, t) for d, t in zip(dgrads, primals, strict=False) if t is not None]
    return [d if d.shape == t.shape else torch.zeros_like(t) for d, t in pairs]


def zeros_for_none(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tangents as forward mode gives them (None: not moved), with zeros in place of None."""
    return tuple(torch.zeros_like(p) if t is None else t for t, p in zip(tangents, primals, strict=True))
