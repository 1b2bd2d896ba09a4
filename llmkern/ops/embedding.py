"""``llmkern::embedding_forward``, ``_backward`` and ``_sparse_backward``, and the renormalisation of a table.

Forward and backward are linear, so each is the other's derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import dispatch
from ..reference.embedding import embedding as reference
from ..reference.embedding import embedding_row_scale
from ._autograd import KernelFunction, differentiating
from ._library import define
from ._sparse import differentiable_sparse_gradient, sparse_gradient

embedding_forward = define(
    "embedding_forward(Tensor weight, Tensor indices) -> Tensor",
    lambda weight, indices: weight.new_empty((indices.shape[0], weight.shape[1])),
)
embedding_backward = define(
    "embedding_backward(Tensor dout, Tensor indices, SymInt num_weights, int padding_idx, bool scale_grad_by_freq)"
    " -> Tensor",
    lambda dout, indices, num_weights, padding_idx, scale_grad_by_freq: dout.new_empty((num_weights, dout.shape[1])),
)


class EmbeddingFunction(KernelFunction):
    """out[n] = weight[indices[n]]."""

    @staticmethod
    def forward(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, backend: str) -> Tensor:
        return embedding_forward(weight, indices, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, indices, *ctx.options = inputs
        ctx.num_weights = weight.shape[0]
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        dweight = EmbeddingBackwardFunction.run(dout.contiguous(), indices, ctx.num_weights, *ctx.options)
        return dweight, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, dweight: Tensor, *_: None) -> Tensor:
        (indices,) = ctx.saved_tensors
        return EmbeddingFunction.run(dweight.contiguous(), indices, *ctx.options)


class EmbeddingBackwardFunction(KernelFunction):
    """dweight[r] = sum of dout[n] where indices[n] == r, r != padding_idx (divided by the count if by_freq)."""

    @staticmethod
    def forward(
        dout: Tensor,
        indices: Tensor,
        num_weights: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        backend: str,
    ) -> Tensor:
        return embedding_backward(dout, indices, num_weights, padding_idx, scale_grad_by_freq, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, indices, *ctx.options = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        num_weights, padding_idx, scale_grad_by_freq, backend = ctx.options
        # A plain lookup: the scale below carries padding and frequency, in this derivative and in the next.
        ddout = EmbeddingFunction.run(ddweight.contiguous(), indices, -1, False, backend)
        ddout = ddout * embedding_row_scale(indices, num_weights, padding_idx, scale_grad_by_freq, ddout)
        return ddout, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, ddout: Tensor, *_: None) -> Tensor:
        (indices,) = ctx.saved_tensors
        return EmbeddingBackwardFunction.run(ddout.contiguous(), indices, *ctx.options)


class EmbeddingSparseFunction(Function):
    """The same with a sparse gradient; plain eager autograd only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor, padding_idx: int, backend: str) -> Tensor:
        ctx.num_weights, ctx.padding_idx, ctx.backend = weight.shape[0], padding_idx, backend
        ctx.save_for_backward(indices)
        return embedding_forward(weight, indices, backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        options = ctx.num_weights, ctx.padding_idx
        if torch.is_grad_enabled():
            return differentiable_sparse_gradient(indices, dout, *options), None, None, None
        rows, values = dispatch.load(ctx.backend).embedding_sparse_backward(dout.contiguous(), indices, *options)
        return sparse_gradient(rows, values, ctx.num_weights), None, None, None


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool, backend: str
) -> Tensor:
    """Rows of ``weight`` (V, D), contiguous, at ``indices`` (N), contiguous: (N, D). ``padding_idx`` < 0: none."""
    if backend == "reference":
        return reference(weight, indices, padding_idx, scale_grad_by_freq)
    if not differentiating(weight):
        return embedding_forward(weight, indices, backend)
    if sparse:
        return EmbeddingSparseFunction.apply(weight, indices, padding_idx, backend)
    return EmbeddingFunction.run(weight, indices, padding_idx, scale_grad_by_freq, backend)


def renormalise(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float, backend: str) -> None:
    """Scales rows of ``weight`` at ``indices`` (N), contiguous, down to a norm of ``max_norm``, in place.

    Raises:
        IndexError: if an index is outside [0, V); ``weight`` is as it was.
    """
    with torch.no_grad():
        # What follows is no op: of a table with row gradients this is the memory.
        weight = weight.detach()
        if backend != "reference" and weight.is_contiguous():
            dispatch.load(backend).embedding_renorm_(weight, indices, max_norm, norm_type)
            if not weight.is_inference():
                torch.autograd.graph.increment_version(weight)
            return
        if indices.numel() and (indices.min() < 0 or indices.max() >= weight.shape[0]):
            raise IndexError("index out of range in self")
        torch.embedding_renorm_(weight, indices, max_norm, norm_type)
