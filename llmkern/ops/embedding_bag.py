"""Embedding bags: torch's kernels, with the derivatives that torch lacks from the reference.

torch has no second derivative of a bag, and its CPU gradient with ``scale_grad_by_freq`` divides by the count
of another row. Both come from differentiating the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ._autograd import reference_vjp

_MODES = {"sum": 0, "mean": 1, "max": 2}


class EmbeddingBagFunction(Function):
    """out[b] = sum, mean or max of weight[indices[offsets[b] : offsets[b + 1]]]."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        indices: Tensor,
        offsets: Tensor,
        mode: str,
        include_last_offset: bool,
        padding_idx: int,
        scale_grad_by_freq: bool,
        sparse: bool,
    ) -> Tensor:
        ctx.options = mode, include_last_offset, padding_idx, scale_grad_by_freq, sparse
        out, *tables = torch._embedding_bag(
            weight,
            indices,
            offsets,
            scale_grad_by_freq,
            _MODES[mode],
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
        ctx.save_for_backward(weight, per_sample_weights, indices, offsets, *tables)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        need_weight, need_samples = ctx.needs_input_grad[:2]
        weight, samples, indices, offsets, bag, size, largest = ctx.saved_tensors
        mode, _, padding_idx, scale_grad_by_freq, sparse = ctx.options
        if torch.is_grad_enabled() or scale_grad_by_freq:
            return *_reference_gradients(dout, weight, samples, indices, offsets, ctx.options), *[None] * 7
        dweight = dsamples = None
        if need_weight:
            dweight = torch.ops.aten._embedding_bag_backward.default(
                dout,
                indices,
                offsets,
                bag,
                size,
                largest,
                weight.shape[0],
                scale_grad_by_freq,
                _MODES[mode],
                sparse,
                samples,
                padding_idx,
            )
        if need_samples:
            dsamples = torch.ops.aten._embedding_bag_per_sample_weights_backward.default(
                dout, weight, indices, offsets, bag, _MODES[mode], padding_idx
            )
        return dweight, dsamples, *[None] * 7


def _reference_gradients(
    dout: Tensor,
    weight: Tensor,
    samples: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None]:
    mode, include_last_offset, padding_idx, scale_grad_by_freq, _ = options

    def bag(weight: Tensor, samples: Tensor | None = None) -> Tensor:
        return reference.embedding_bag(
            weight, indices, offsets, mode, samples, include_last_offset, padding_idx, scale_grad_by_freq
        )

    gradients = reference_vjp(bag, (weight,) if samples is None else (weight, samples), dout)
    return gradients[0], None if samples is None else gradients[1]


def embedding_bag(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    backend: str,
) -> Tensor:
    """Bags of rows of ``weight`` (V, D): ``indices`` (N), ``offsets`` (B) or (B + 1).

    ``padding_idx`` < 0: none.
    """
    if backend == "reference":
        return reference.embedding_bag(
            weight,
            indices,
            offsets,
            mode,
            per_sample_weights,
            include_last_offset,
            padding_idx,
            scale_grad_by_freq,
        )
    return EmbeddingBagFunction.apply(
        weight,
        per_sample_weights,
        indices,
        offsets,
        mode,
        include_last_offset,
        padding_idx,
        scale_grad_by_freq,
        sparse,
    )


def stands_in_for_torch(
    weight: Tensor, per_sample_weights: Tensor | None, sparse: bool, max_norm: float | None
) -> bool:
    """Whether :func:`embedding_bag` is to take the place of torch's function: in plain eager autograd.

    Compiled and transformed calls, sparse gradients, and tables that are renormalised, perhaps again before
    this call's backward, take torch's own way.
    """
    if sparse or max_norm is not None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not weight.requires_grad and (per_sample_weights is None or not per_sample_weights.requires_grad):
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
