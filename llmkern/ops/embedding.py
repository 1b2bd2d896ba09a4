"""``llmkern::embedding_forward`` and ``_backward``. Linear in both directions, so each is the other's derivative."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ._autograd import KernelFunction, differentiating
from ._library import define

embedding_forward = define(
    "embedding_forward(Tensor weight, Tensor indices, str backend) -> Tensor",
    lambda weight, indices: weight.new_empty((indices.shape[0], weight.shape[1])),
)
embedding_backward = define(
    "embedding_backward(Tensor dout, Tensor indices, SymInt num_weights, int padding_idx, bool scale_grad_by_freq,"
    " str backend) -> Tensor",
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
        ddout = ddout * reference.embedding_row_scale(indices, num_weights, padding_idx, scale_grad_by_freq, ddout)
        return ddout, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, ddout: Tensor, *_: None) -> Tensor:
        (indices,) = ctx.saved_tensors
        return EmbeddingBackwardFunction.run(ddout.contiguous(), indices, *ctx.options)


def embedding(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, backend: str) -> Tensor:
    """Rows of ``weight`` (V, D), contiguous, at ``indices`` (N), contiguous: (N, D). ``padding_idx`` < 0: none."""
    if backend == "reference":
        return reference.embedding(weight, indices, padding_idx, scale_grad_by_freq)
    if not differentiating(weight):
        return embedding_forward(weight, indices, backend)
    return EmbeddingFunction.run(weight, indices, padding_idx, scale_grad_by_freq, backend)
