"""``llmkern::fused_embedding_forward`` and ``_backward``: lookup, positions, norm and dropout in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from .._groups import FUSED_EMBEDDING_PRIMALS, FusedEmbeddingInputs, FusedEmbeddingOptions
from ..reference.fused_embedding import fused_embedding as reference
from ._autograd import (
    KernelFunction,
    differentiating,
    of_present,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    takes,
    tangents_of,
    wanted_cotangents,
    zeros_for_none,
)
from ._library import define


def _forward_fake(inputs: FusedEmbeddingInputs, options: FusedEmbeddingOptions) -> tuple[Tensor, Tensor]:
    weight, N = inputs.weight, inputs.indices.shape[0]
    stats = weight.new_empty((0 if options.norm == "none" else N, 2), dtype=accumulate_dtype(weight.dtype))
    return weight.new_empty((N, weight.shape[1])), stats


def _backward_fake(dout: Tensor, inputs: FusedEmbeddingInputs, *args: Any) -> tuple[Tensor, ...]:
    primals, wants = inputs[:FUSED_EMBEDDING_PRIMALS], args[-1]
    return tuple(dout.new_empty(t.shape if wants >> k & 1 and t is not None else (0,)) for k, t in enumerate(primals))


fused_embedding_forward = define(
    "fused_embedding_forward(FusedEmbeddingInputs, FusedEmbeddingOptions) -> (Tensor out, Tensor stats)", _forward_fake
)
# A gradient that is not wanted is an empty tensor.
fused_embedding_backward = define(
    "fused_embedding_backward(Tensor dout, FusedEmbeddingInputs, Tensor stats, FusedEmbeddingOptions, int wants)"
    " -> (Tensor dweight, Tensor dposition_weight, Tensor dtoken_type_weight, Tensor dnorm_weight, Tensor dnorm_bias)",
    _backward_fake,
)
_INPUTS, _TABLES = len(FusedEmbeddingInputs._fields), 3


class FusedEmbeddingFunction(KernelFunction):
    """(out, stats); the second is each row's mean and 1 / deviation, for the backward, and has no gradient."""

    @staticmethod
    @takes(FusedEmbeddingInputs, "options", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, options, backend = arguments
        return fused_embedding_forward(*inputs, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.options, ctx.backend = inputs
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
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[:FUSED_EMBEDDING_PRIMALS]
        wants = sum(need << k for k, need in enumerate(needs))
        grads = FusedEmbeddingBackwardFunction.run(
            dout.contiguous(), *ctx.saved_tensors, ctx.options, wants, ctx.backend
        )
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        inputs = ctx.saved_tensors[:_INPUTS]
        function, primals = _reference(inputs, _unruled(ctx.options))
        return reference_jvp(function, primals, tangents_of(tangents, inputs[:FUSED_EMBEDDING_PRIMALS])), None


class FusedEmbeddingBackwardFunction(KernelFunction):
    """Gradients of the five primals; bit k of ``wants`` says whether of the k-th."""

    @staticmethod
    @takes("dout", FusedEmbeddingInputs, "stats", "options", "wants", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, options, wants, backend = arguments
        return tuple(fused_embedding_backward(*tensors, *options, wants, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.options, ctx.wants, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor) -> tuple[Tensor | None, ...]:
        dout, *inputs = ctx.saved_tensors
        function, primals = _reference(inputs, ctx.options)
        given = wanted_cotangents(dgrads, inputs[:FUSED_EMBEDDING_PRIMALS])
        dprimals, (ddout,) = reference_vjp_vjp(function, primals, (dout,), given)
        found = iter(dprimals)
        grads = [ddout, *(None if t is None else next(found) for t in inputs[:FUSED_EMBEDDING_PRIMALS])]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))

    @staticmethod
    def tangent(ctx: Any, ddout: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        dout, *inputs = ctx.saved_tensors
        function, primals = _reference(inputs, _unruled(ctx.options))

        def gradients(dout: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
            return reference_vjp(function, primals, dout)

        moves = (*zeros_for_none((ddout,), (dout,)), *tangents_of(tangents, inputs[:FUSED_EMBEDDING_PRIMALS]))
        dweight, *others = reference_jvp(gradients, (dout, *primals), moves)
        moved = iter((dweight * _row_factors(inputs[0], inputs[FUSED_EMBEDDING_PRIMALS], ctx.options), *others))
        every = [dout.new_zeros(0) if t is None else next(moved) for t in inputs[:FUSED_EMBEDDING_PRIMALS]]
        return tuple(move if ctx.wants >> k & 1 else dout.new_zeros(0) for k, move in enumerate(every))


def _reference(inputs: Sequence[Any], options: FusedEmbeddingOptions) -> tuple[Any, tuple[Tensor, ...]]:
    """The reference as a function of the primals that are there, and these."""
    primals, rows = inputs[:FUSED_EMBEDDING_PRIMALS], inputs[FUSED_EMBEDDING_PRIMALS:]

    def function(*tensors: Any) -> Tensor:
        return reference(FusedEmbeddingInputs(*tensors, *rows), options)

    return of_present(function, primals)


def _unruled(options: FusedEmbeddingOptions) -> FusedEmbeddingOptions:
    """Padding and frequency are rules for gradients: a directional derivative does not know them."""
    return options._replace(padding_idx=-1, scale_grad_by_freq=False)


def _row_factors(weight: Tensor, indices: Tensor, options: FusedEmbeddingOptions) -> Tensor:
    """What padding and frequency multiply the rows of dweight by: (V, 1)."""
    factors = weight.new_ones(weight.shape[0])
    if options.scale_grad_by_freq:
        counts = torch.zeros_like(factors, dtype=torch.float64)
        counts = counts.index_add(0, indices, counts.new_ones(indices.shape))
        factors = (1 / counts.clamp(min=1)).to(weight.dtype)
    if options.padding_idx >= 0:
        factors = factors.index_fill(0, torch.tensor(options.padding_idx, device=weight.device), 0)
    return factors.unsqueeze(-1)


def fused_embedding(inputs: FusedEmbeddingInputs, options: FusedEmbeddingOptions, backend: str) -> Tensor:
    """(N, D), as :func:`llmkern.reference.fused_embedding`."""
    if backend == "reference":
        return reference(inputs, options)
    if not differentiating(*inputs[:FUSED_EMBEDDING_PRIMALS]):
        return fused_embedding_forward(*inputs, *options, backend)[0]
    return FusedEmbeddingFunction.run(*inputs, options, backend)[0]
