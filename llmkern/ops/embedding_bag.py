"""Embedding bags: sums and means, and maxes.

A sum of bags is linear in the table and in the weights of the samples, and what a bag's gradient is paired with makes a
form of three arguments: ``sum_i samples[i] * <dout[bag of i], weight[indices[i]]>``. Its three partial derivatives are
the forward, the table's gradient and the samples' gradient, and each has the other two for its own derivatives, to any
order. A max chooses elements; its derivatives gather and scatter by the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import dispatch
from ..reference.embedding import embedding_row_scale
from ..reference.embedding_bag import embedding_bag as reference
from ._autograd import KernelFunction, differentiating, pure
from ._library import define
from ._sparse import differentiable_sparse_gradient, sparse_gradient

embedding_bag_forward = define(
    "embedding_bag_forward(Tensor weight, Tensor? samples, Tensor indices, Tensor? offsets, SymInt num_bags, bool mean,"
    " bool include_last_offset, int padding_idx) -> Tensor",
    lambda weight, samples, indices, offsets, num_bags, *_: weight.new_empty((num_bags, weight.shape[1])),
)
# largest (B, D): the position in `indices` of each chosen element, -1 for none.
embedding_bag_max_forward = define(
    "embedding_bag_max_forward(Tensor weight, Tensor indices, Tensor? offsets, SymInt num_bags,"
    " bool include_last_offset, int padding_idx) -> (Tensor out, Tensor largest)",
    lambda weight, indices, offsets, num_bags, *_: (
        weight.new_empty((num_bags, weight.shape[1])),
        weight.new_empty((num_bags, weight.shape[1]), dtype=torch.int32),
    ),
)
embedding_bag_backward = define(
    "embedding_bag_backward(Tensor dout, Tensor? samples, Tensor indices, Tensor? offsets, Tensor? largest,"
    " SymInt num_weights, bool mean, bool include_last_offset, int padding_idx, bool scale_grad_by_freq)"
    " -> Tensor",
    lambda dout, samples, indices, offsets, largest, num_weights, *_: dout.new_empty((num_weights, dout.shape[1])),
)
embedding_bag_samples_backward = define(
    "embedding_bag_samples_backward(Tensor dout, Tensor weight, Tensor indices, Tensor? offsets, bool mean,"
    " bool include_last_offset, int padding_idx) -> Tensor",
    lambda dout, weight, indices, *_: dout.new_empty(indices.shape),
)


class Options(NamedTuple):
    """What a call of bags is, beside its tensors."""

    num_bags: int
    num_weights: int
    mean: bool
    include_last_offset: bool
    padding_idx: int
    scale_grad_by_freq: bool
    backend: str

    # No property: the compiler of torch 2.10 knows none of a tuple.
    def bags(self) -> tuple[bool, int]:
        return self.include_last_offset, self.padding_idx


def _call(ctx: Any) -> tuple[Any, ...]:
    """What a function was called with."""
    return (*ctx.saved_tensors, ctx.options)


def _sized(options: Options, bags: Tensor, table: Tensor) -> Options:
    """``options`` with their sizes read off tensors of the call. The compiler hands on to a backward what a forward has
    read; of numbers that only stand in a call's arguments, it knows nothing there."""
    return options._replace(num_bags=bags.shape[0], num_weights=table.shape[0]) if pure() else options


def _keep(ctx: Any, inputs: tuple[Any, ...], bags: Tensor, table: Tensor) -> None:
    """Keeps a call of a bilinear function; ``bags`` has a row for each bag, ``table`` one for each row of the table."""
    first, second, indices, offsets, options = inputs
    ctx.options = _sized(options, bags, table)
    saved = None if second is None else first, second, indices, offsets
    ctx.save_for_forward(*saved)
    if not pure():
        # What no gradient reads may change.
        need_first, need_second = ctx.needs_input_grad[:2]
        saved = first if need_second else None, second if need_first else None, indices, offsets
    ctx.save_for_backward(*saved)


class _BilinearFunction(KernelFunction):
    """A function of two tensors, linear in each, for one call's (indices, offsets, options).

    A subclass gives ``forward(first, second, *call)`` and, of a cotangent dy, ``of_first(dy, second, *call)`` and
    ``of_second(dy, first, *call)``. ``second`` may be None, for ones. The first is then not kept: as in torch, a table
    may be changed before the backward.
    """

    of_first: Callable[..., Tensor]
    of_second: Callable[..., Tensor]

    def __init_subclass__(cls) -> None:
        # autograd's methods are static: each class needs its own.
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            first, second, *call = _call(ctx)
            dy = dy.contiguous()
            dfirst = cls.of_first(dy, second, *call) if ctx.needs_input_grad[0] else None
            dsecond = cls.of_second(dy, first, *call) if ctx.needs_input_grad[1] else None
            return dfirst, dsecond, None, None, None

        def tangent(ctx: Any, dfirst: Tensor | None, dsecond: Tensor | None, *_: None) -> Tensor:
            first, second, *call = _call(ctx)
            along_first = None if dfirst is None else cls.run(dfirst.contiguous(), second, *call)
            if dsecond is None:
                assert along_first is not None
                return along_first
            along_second = cls.run(first, dsecond.contiguous(), *call)
            return along_second if along_first is None else along_first + along_second

        cls.backward = staticmethod(backward)  # type: ignore[method-assign]
        cls.tangent = staticmethod(tangent)  # type: ignore[method-assign]


class EmbeddingBagFunction(_BilinearFunction):
    """out[b] = sum, or mean, of samples[i] * weight[indices[i]] over i in bag b."""

    @staticmethod
    def forward(
        weight: Tensor, samples: Tensor | None, indices: Tensor, offsets: Tensor | None, options: Options
    ) -> Tensor:
        return embedding_bag_forward(
            weight, samples, indices, offsets, options.num_bags, options.mean, *options.bags(), options.backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs, bags=output, table=inputs[0])

    @staticmethod
    def of_first(dout: Tensor, samples: Tensor | None, *call: Any) -> Tensor:
        return TableGradientFunction.run(dout, samples, *call)

    @staticmethod
    def of_second(dout: Tensor, weight: Tensor, *call: Any) -> Tensor:
        return SamplesGradientFunction.run(dout, weight, *call)


class TableGradientFunction(_BilinearFunction):
    """dweight[r] = sum of samples[i] * dout[bag of i] over indices[i] == r, divided by their number if by frequency."""

    @staticmethod
    def forward(
        dout: Tensor, samples: Tensor | None, indices: Tensor, offsets: Tensor | None, options: Options
    ) -> Tensor:
        return embedding_bag_backward(
            dout,
            samples,
            indices,
            offsets,
            None,
            options.num_weights,
            options.mean,
            *options.bags(),
            options.scale_grad_by_freq,
            options.backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs, bags=inputs[0], table=output)

    @staticmethod
    def of_first(ddweight: Tensor, samples: Tensor | None, *call: Any) -> Tensor:
        scale, plain = _frequency(ddweight, *call)
        if scale is not None:
            samples = scale if samples is None else samples * scale
        return EmbeddingBagFunction.run(ddweight, samples, *plain)

    @staticmethod
    def of_second(ddweight: Tensor, dout: Tensor, *call: Any) -> Tensor:
        scale, plain = _frequency(ddweight, *call)
        dsamples = SamplesGradientFunction.run(dout, ddweight, *plain)
        return dsamples if scale is None else dsamples * scale


class SamplesGradientFunction(_BilinearFunction):
    """dsamples[i] = <dout[bag of i], weight[indices[i]]>; 0 at padding."""

    @staticmethod
    def forward(dout: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None, options: Options) -> Tensor:
        return embedding_bag_samples_backward(
            dout, weight, indices, offsets, options.mean, *options.bags(), options.backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs, bags=inputs[0], table=inputs[1])

    @staticmethod
    def of_first(ddsamples: Tensor, weight: Tensor, *call: Any) -> Tensor:
        return EmbeddingBagFunction.run(weight, ddsamples, *call)

    @staticmethod
    def of_second(ddsamples: Tensor, dout: Tensor, *call: Any) -> Tensor:
        return TableGradientFunction.run(dout, ddsamples, *call)


def _frequency(
    like: Tensor, indices: Tensor, offsets: Tensor | None, options: Options
) -> tuple[Tensor | None, tuple[Any, ...]]:
    """What a row's gradient is multiplied by (N), if by frequency, and a call whose derivatives do not do it again."""
    if not options.scale_grad_by_freq:
        return None, (indices, offsets, options)
    counted = indices
    if options.include_last_offset and offsets is not None:
        # What lies behind the last bag counts for another row.
        position = torch.arange(indices.shape[0], device=indices.device)
        counted = torch.where(position < offsets[-1], indices, options.num_weights)
    scale = embedding_row_scale(counted, options.num_weights + 1, -1, True, like).squeeze(-1)
    return scale, (indices, offsets, options._replace(scale_grad_by_freq=False))


def _chosen(weight: Tensor, indices: Tensor, largest: Tensor) -> Tensor:
    """The elements of ``weight`` (V, D) that a max has chosen: (B, D), 0 where there were none."""
    if indices.shape[0] == 0:
        return weight.new_zeros(largest.shape) + 0 * weight.sum()
    rows = indices.long()[largest.clamp(min=0).long()]
    return weight.gather(0, rows).masked_fill(largest < 0, 0)


class EmbeddingBagMaxFunction(KernelFunction):
    """(out, largest): the first of the largest elements of each bag and column, and where it stood."""

    @staticmethod
    def forward(weight: Tensor, indices: Tensor, offsets: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
        return embedding_bag_max_forward(weight, indices, offsets, options.num_bags, *options.bags(), options.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, indices, offsets, options = inputs
        ctx.options = _sized(options, output[0], weight)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices, offsets, output[1])
        ctx.save_for_forward(indices, offsets, output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        dweight = None
        if dout is not None:
            dweight = MaxGradientFunction.run(dout.contiguous(), *ctx.saved_tensors, ctx.options)
        return dweight, None, None, None

    @staticmethod
    def tangent(ctx: Any, dweight: Tensor, *_: None) -> tuple[Tensor, None]:
        indices, _, largest = ctx.saved_tensors
        return _chosen(dweight, indices, largest), None


class MaxGradientFunction(KernelFunction):
    """dweight[r, d] = sum of dout[b, d] over the bags that chose it."""

    @staticmethod
    def forward(dout: Tensor, indices: Tensor, offsets: Tensor | None, largest: Tensor, options: Options) -> Tensor:
        return embedding_bag_backward(
            dout, None, indices, offsets, largest, options.num_weights, False, *options.bags(), False, options.backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *saved, ctx.options = inputs
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
        indices, _, largest = ctx.saved_tensors
        return _chosen(ddweight, indices, largest), None, None, None, None

    @staticmethod
    def tangent(ctx: Any, ddout: Tensor, *_: None) -> Tensor:
        return MaxGradientFunction.run(ddout.contiguous(), *ctx.saved_tensors, ctx.options)


class EmbeddingBagSparseFunction(Function):
    """The same sum with a sparse gradient of the table; plain eager autograd only."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, samples: Tensor | None, indices: Tensor, offsets: Tensor | None, options: Options
    ) -> Tensor:
        output = EmbeddingBagFunction.forward(weight, samples, indices, offsets, options)
        EmbeddingBagFunction.setup_context(ctx, (weight, samples, indices, offsets, options), output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, samples, *call = _call(ctx)
        dout, dweight, dsamples = dout.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            gradient = _differentiable_sparse if torch.is_grad_enabled() else _sparse
            dweight = gradient(dout, samples, *call)
        if ctx.needs_input_grad[1]:
            dsamples = SamplesGradientFunction.run(dout, weight, *call)
        return dweight, dsamples, None, None, None


def _sparse(dout: Tensor, samples: Tensor | None, indices: Tensor, offsets: Tensor | None, options: Options) -> Tensor:
    rows, values = dispatch.load(options.backend).embedding_bag_sparse_backward(
        dout, samples, indices, offsets, options.num_weights, options.mean, *options.bags()
    )
    return sparse_gradient(rows, values, options.num_weights)


def _differentiable_sparse(
    dout: Tensor, samples: Tensor | None, indices: Tensor, offsets: Tensor | None, options: Options
) -> Tensor:
    """Each position is made a row of its own: their gradients are the values."""
    N = indices.shape[0]
    own = torch.where(indices == options.padding_idx, N, torch.arange(N, device=indices.device))
    alone = options._replace(num_weights=N + 1, padding_idx=N)
    values = TableGradientFunction.run(dout, samples, own, offsets, alone)[:N]
    return differentiable_sparse_gradient(indices, values, options.num_weights, options.padding_idx)


class BagIndexError(IndexError, RuntimeError):
    """An index that is no row: an IndexError, as for a lookup, and the RuntimeError that torch raises for bags."""


def embedding_bag(
    weight: Tensor,
    samples: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    num_bags: int,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    backend: str,
) -> Tensor:
    """Bags of rows of ``weight`` (V, D): ``indices`` (N), ``samples`` (N) or None, all contiguous.

    ``offsets`` (B), or (B + 1) with ``include_last_offset``, or None for bags of equal length. ``padding_idx`` < 0:
    none.
    """
    if backend == "reference":
        if offsets is None:
            length = indices.shape[0] // max(num_bags, 1)
            offsets = torch.arange(num_bags, device=indices.device) * length
        return reference(weight, indices, offsets, mode, samples, include_last_offset, padding_idx, scale_grad_by_freq)
    include_last_offset = include_last_offset and offsets is not None
    options = Options(
        num_bags, weight.shape[0], mode == "mean", include_last_offset, padding_idx, scale_grad_by_freq, backend
    )
    derivatives = differentiating(weight, samples)
    if mode == "max":
        function = EmbeddingBagMaxFunction.run if derivatives else EmbeddingBagMaxFunction.forward
        return function(weight, indices, offsets, options)[0]
    function = EmbeddingBagFunction.run if derivatives else EmbeddingBagFunction.forward
    if sparse and derivatives:
        function = EmbeddingBagSparseFunction.apply
    return function(weight, samples, indices, offsets, options)
