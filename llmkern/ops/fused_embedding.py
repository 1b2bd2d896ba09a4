"""``llmkern::fused_embedding_forward`` and ``_backward``: lookup, positions, norm and dropout in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._facts import accumulate_dtype
from ._autograd import (
    KernelFunction,
    differentiating,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    zeros_for_none,
)
from ._library import define


class Options(NamedTuple):
    """What is done to the rows; see :mod:`llmkern.reference.fused_embedding`."""

    scale: float = 1.0
    norm: str = "none"
    eps: float = 1e-5
    p: float = 0.0
    seed: int = 0
    padding_idx: int = -1
    scale_grad_by_freq: bool = False


_INPUTS = (
    "Tensor weight, Tensor? position_weight, Tensor? token_type_weight, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor indices, Tensor? positions, Tensor? token_types"
)
_OPTIONS = "float scale, str norm, float eps, float p, int seed, int padding_idx, bool scale_grad_by_freq"
# Of the inputs, those that can have a gradient: the three tables come first.
_TENSORS, _PRIMALS, _TABLES = 8, 5, 3


def _forward_fake(weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    indices, norm = args[4], args[8]
    rows = 0 if norm == "none" else indices.shape[0]
    stats = weight.new_empty((rows, 2), dtype=accumulate_dtype(weight.dtype))
    return weight.new_empty((indices.shape[0], weight.shape[1])), stats


def _backward_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    operands, wants = args[:_PRIMALS], args[-1]
    return tuple(dout.new_empty(t.shape if wants >> k & 1 and t is not None else (0,)) for k, t in enumerate(operands))


fused_embedding_forward = define(
    f"fused_embedding_forward({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor stats)", _forward_fake
)
# A gradient that is not wanted is an empty tensor.
fused_embedding_backward = define(
    f"fused_embedding_backward(Tensor dout, {_INPUTS}, Tensor stats, {_OPTIONS}, int wants)"
    " -> (Tensor dweight, Tensor dposition_weight, Tensor dtoken_type_weight, Tensor dnorm_weight, Tensor dnorm_bias)",
    _backward_fake,
)


class FusedEmbeddingFunction(KernelFunction):
    """(out, stats); the second is each row's mean and 1 / deviation, for the backward, and has no gradient."""

    @staticmethod
    def forward(
        weight: Tensor,
        position_weight: Tensor | None,
        token_type_weight: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        indices: Tensor,
        positions: Tensor | None,
        token_types: Tensor | None,
        scale: float,
        norm: str,
        eps: float,
        p: float,
        seed: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        operands = (weight, position_weight, token_type_weight, norm_weight, norm_bias)
        options = (scale, norm, eps, p, seed, padding_idx, scale_grad_by_freq)
        return fused_embedding_forward(*operands, indices, positions, token_types, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors, ctx.options, ctx.backend = list(inputs[:_TENSORS]), Options(*inputs[_TENSORS:-1]), inputs[-1]
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        if ctx.options.norm == "none":
            # Linear: as with torch's embedding, a table may change before the backward, which asks for its shape only.
            tensors[:_TABLES] = [None if t is None else t.new_zeros(()).expand(t.shape) for t in tensors[:_TABLES]]
        # vmap takes the two lists for one.
        ctx.save_for_backward(*tensors, stats)
        ctx.save_for_forward(*tensors, stats)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 16
        needs = ctx.needs_input_grad[:_PRIMALS]
        wants = sum(need << k for k, need in enumerate(needs))
        grads = FusedEmbeddingBackwardFunction.run(
            dout.contiguous(), *ctx.saved_tensors, *ctx.options, wants, ctx.backend
        )
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 11

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        inputs = ctx.saved_tensors[:_TENSORS]
        function, primals = _reference(inputs, _unruled(ctx.options))
        return reference_jvp(function, primals, _present(tangents, inputs, primals)), None


class FusedEmbeddingBackwardFunction(KernelFunction):
    """Gradients of the five primals; bit k of ``wants`` says whether of the k-th."""

    @staticmethod
    def forward(
        dout: Tensor,
        weight: Tensor,
        position_weight: Tensor | None,
        token_type_weight: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        indices: Tensor,
        positions: Tensor | None,
        token_types: Tensor | None,
        stats: Tensor,
        scale: float,
        norm: str,
        eps: float,
        p: float,
        seed: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        wants: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        operands = (weight, position_weight, token_type_weight, norm_weight, norm_bias)
        rows = (indices, positions, token_types)
        options = (scale, norm, eps, p, seed, padding_idx, scale_grad_by_freq)
        return tuple(fused_embedding_backward(dout, *operands, *rows, stats, *options, wants, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, (_, *options, ctx.wants, _) = inputs[: _TENSORS + 1], inputs[_TENSORS + 1 :]
        ctx.options = Options(*options)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor) -> tuple[Tensor | None, ...]:
        dout, *inputs = ctx.saved_tensors
        function, primals = _reference(inputs, ctx.options)
        # A gradient that nobody asked for was empty, and so is what comes back for it.
        given = [d for d, t in zip(dgrads, inputs, strict=False) if t is not None]
        given = [d if d.shape == p.shape else torch.zeros_like(p) for d, p in zip(given, primals, strict=True)]
        dprimals, (ddout,) = reference_vjp_vjp(function, primals, (dout,), given)
        found = iter(dprimals)
        return ddout, *(None if t is None else next(found) for t in inputs[:_PRIMALS]), *[None] * 13

    @staticmethod
    def tangent(ctx: Any, ddout: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        dout, *inputs = ctx.saved_tensors
        function, primals = _reference(inputs, _unruled(ctx.options))

        def gradients(dout: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
            return reference_vjp(function, primals, dout)

        moves = (*zeros_for_none((ddout,), (dout,)), *_present(tangents, inputs, primals))
        dweight, *others = reference_jvp(gradients, (dout, *primals), moves)
        moved = iter((dweight * _row_factors(inputs[0], inputs[_PRIMALS], ctx.options), *others))
        every = [dout.new_zeros(0) if t is None else next(moved) for t in inputs[:_PRIMALS]]
        return tuple(move if ctx.wants >> k & 1 else dout.new_zeros(0) for k, move in enumerate(every))


def _reference(inputs: Any, options: Options) -> tuple[Any, tuple[Tensor, ...]]:
    """The reference as a function of the primals that are there, and these."""
    present = [t is not None for t in inputs[:_PRIMALS]]

    def function(*tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        full: list[Any] = [next(remaining) if here else None for here in present]
        return reference.fused_embedding(*full, *inputs[_PRIMALS : _PRIMALS + 3], *options)  # type: ignore[call-arg]

    return function, tuple(t for t in inputs[:_PRIMALS] if t is not None)


def _unruled(options: Options) -> Options:
    """Padding and frequency are rules for gradients: a directional derivative does not know them."""
    return options._replace(padding_idx=-1, scale_grad_by_freq=False)


def _row_factors(weight: Tensor, indices: Tensor, options: Options) -> Tensor:
    """What padding and frequency multiply the rows of dweight by: (V, 1)."""
    factors = weight.new_ones(weight.shape[0])
    if options.scale_grad_by_freq:
        counts = torch.zeros_like(factors, dtype=torch.float64)
        counts = counts.index_add(0, indices, counts.new_ones(indices.shape))
        factors = (1 / counts.clamp(min=1)).to(weight.dtype)
    if options.padding_idx >= 0:
        factors = factors.index_fill(0, torch.tensor(options.padding_idx, device=weight.device), 0)
    return factors.unsqueeze(-1)


def _present(tangents: Any, inputs: Any, primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    moved = [d for d, t in zip(tangents, inputs[:_PRIMALS], strict=False) if t is not None]
    return zeros_for_none(moved, primals)


def fused_embedding(
    weight: Tensor,
    operands: tuple[Tensor | None, ...],
    rows: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    backend: str,
) -> Tensor:
    """(N, D), as :func:`llmkern.reference.fused_embedding`; all tensors contiguous.

    ``operands``: position_weight, token_type_weight, norm_weight, norm_bias. ``rows``: indices, positions, token_types.
    """
    if backend == "reference":
        return reference.fused_embedding(weight, *operands, *rows, *options)  # type: ignore[arg-type,call-arg]
    if not differentiating(weight, *operands):
        return fused_embedding_forward(weight, *operands, *rows, *options, backend)[0]
    return FusedEmbeddingFunction.run(weight, *operands, *rows, *options, backend)[0]
