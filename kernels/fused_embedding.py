"""Token + position + token type, norm and dropout: out = dropout(norm(scale * weight[token] + position + type)).

Traffic. Forward: each row is read once, out is written once; a composition of torch's functions writes and reads N*D
again for every step. Nothing of that size is kept for the backward but the indices and two numbers a row: the
normalised row is computed again from the tables, the mask from its seed. A program keeps whole rows in registers from
the first read to the last write; past D = 4096 a row is read again instead, from L1.

Backward: one pass writes the gradient at the sum, N*D, because a norm's gradient needs a whole row before its first
element is known; then each table adds up its rows of it, by tokens, positions and types. Gradients of the norm's own
weights are partial sums over partitions of the tokens, each in the registers of one program, added in order by a
second kernel: how many partitions there are depends on N alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._groups import FUSED_EMBEDDING_PRIMALS, FusedEmbeddingInputs, FusedEmbeddingOptions
from . import _faults, _random
from ._blocks import unit_d
from ._fused_embedding import (
    FusedBackward,
    FusedForward,
    FusedShape,
    Lookup,
    Lookups,
    fused_embedding_backward_kernel,
    fused_embedding_forward_kernel,
    fused_embedding_long_backward_kernel,
    fused_embedding_long_forward_kernel,
    fused_embedding_partitions_kernel,
)
from ._launch import acc_type, accumulator, ceil_div, launch, next_power_of_2
from ._row_order import RowOrder, order_by_row
from ._table_gradient import table_gradient
from .dropout import dropout_forward

# The longest row that is kept in registers.
LONGEST = 4096
# Partitions of the tokens for the norm's gradients: as many as this, of at least so many tokens.
PARTITIONS, PARTITION_TOKENS = 512, 16


class FusedEmbedding(NamedTuple):
    """What both phases are called with: the tables, the norm's weights, the rows, and how they are put together."""

    inputs: FusedEmbeddingInputs
    options: FusedEmbeddingOptions

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, D, and after how many tokens positions and types repeat."""
        periods = (1 if at is None else max(at.shape[0], 1) for at in (self.inputs.positions, self.inputs.token_types))
        return (self.inputs.indices.shape[0], self.inputs.weight.shape[1], *periods)

    @property
    def lookups(self) -> Lookups:
        kinds = (_faults.EMBEDDING, _faults.POSITION, _faults.TOKEN_TYPE)
        return Lookups(
            *(
                Lookup(None, None, None, 0) if table is None else Lookup(table, at, _faults.word(kind), table.shape[0])
                for kind, (_, table, at) in zip(kinds, self.inputs.tables(), strict=True)
            )
        )

    @property
    def dropout(self) -> tuple[int, int | None, float]:
        """As kernels take it: the seed, what random bits are compared with, and 1 / (1 - p)."""
        p, seed = self.options.p, self.options.seed
        return seed, _random.threshold(p) if p > 0 else None, 1 / (1 - p) if p < 1 else 0.0

    def check(self, reads: bool) -> None:
        """``reads``: whether the tables' values are looked at, and not their shapes alone."""
        (N, D), dtype = self.sizes[:2], self.inputs.weight.dtype
        if self.options.norm not in ("none", "layer", "rms"):
            raise ValueError(f"fused_embedding: expected norm none, layer or rms, got {self.options.norm}")
        for name, table, at in self.inputs.tables():
            if (table is None) != (at is None):
                raise ValueError("fused_embedding: expected a table and its indices, or neither")
            if table is None or at is None:
                continue
            if not at.is_contiguous() or (reads and not table.is_contiguous()):
                raise ValueError(f"{name}: expected a contiguous tensor")
            period = at.shape[0]
            repeats = N == 0 if period == 0 else N % period == 0
            if table.dim() != 2 or table.shape[1] != D or table.dtype != dtype or not repeats:
                raise ValueError(f"{name}: expected (rows, D) of weight's dtype, and indices of which N is a multiple")
        for name, row in (("norm_weight", self.inputs.norm_weight), ("norm_bias", self.inputs.norm_bias)):
            if row is not None and (row.shape != (D,) or row.dtype != dtype or not row.is_contiguous()):
                raise ValueError(f"{name}: expected (D) of weight's dtype, contiguous")


def _shape(norm: str, x: Tensor, elements: int, longest: int = LONGEST) -> tuple[FusedShape, int]:
    """Several short rows, or one, by one program: so many elements of a thread, whose registers limit them; and how
    many warps."""
    D, threads = x.shape[1], 128
    BLOCK_D = min(max(next_power_of_2(D), 16), longest)
    rows = min(max(threads * elements // BLOCK_D, 1), 32)
    return FusedShape(norm, acc_type(x), rows, BLOCK_D, unit_d(D)), max(BLOCK_D // elements, threads) // 32


def fused_embedding_forward(inputs: FusedEmbeddingInputs, options: FusedEmbeddingOptions) -> tuple[Tensor, Tensor]:
    """(out, stats): (N, D), and each row's mean and 1 / deviation, (N, 2), without a norm (0, 2); all contiguous.

    Raises:
        IndexError: if an index is outside its table; see :mod:`llmkern.kernels._faults`.
    """
    call, weight, norm = FusedEmbedding(inputs, options), inputs.weight, options.norm
    call.check(True)
    N, D = call.sizes[:2]
    out = weight.new_empty((N, D))
    stats = weight.new_empty((0 if norm == "none" else N, 2), dtype=accumulator(weight))
    S, num_warps = _shape(norm, weight, 16, 1024 if norm == "none" else LONGEST)
    long = norm != "none" and D > LONGEST
    kernel = fused_embedding_long_forward_kernel if long else fused_embedding_forward_kernel
    grid = (ceil_div(N, S.ROWS), 1 if long else max(ceil_div(D, S.BLOCK_D), 1))
    tensors = FusedForward(out, stats, inputs.norm_weight, inputs.norm_bias)
    numbers = *call.sizes, options.scale, options.eps, *call.dropout
    launch(kernel, grid, tensors, call.lookups, *numbers, S=S, num_warps=num_warps)
    return out, stats


def _dsum(call: FusedEmbedding, dout: Tensor, stats: Tensor, wanted: bool, norm_wants: tuple[bool, bool]) -> list[Any]:
    """With a norm: the gradient at the sum, and of the norm's weight and bias; None if it is not wanted."""
    N, D = call.sizes[:2]
    S, num_warps = _shape(call.options.norm, dout, 8)
    learns = any(norm_wants)
    tokens = max(PARTITION_TOKENS, ceil_div(N, PARTITIONS)) if learns else S.ROWS
    partitions = ceil_div(N, tokens)
    dsum = torch.empty_like(dout) if wanted else None
    partials = [dout.new_empty((partitions, D), dtype=accumulator(dout)) if want else None for want in norm_wants]
    tensors = FusedBackward._make((dout, stats, dsum, *partials, call.inputs.norm_weight))
    lookups, sizes, numbers = call.lookups, call.sizes, (call.options.scale, *call.dropout)
    long = D > LONGEST
    if long and wanted:
        kernel, grid = fused_embedding_long_backward_kernel, (ceil_div(N, S.ROWS),)
        launch(kernel, grid, tensors, lookups, *sizes, *numbers, S=S, num_warps=num_warps)
        tensors = tensors._replace(dsum=None)
    if learns or (wanted and not long):
        kernel, grid = fused_embedding_backward_kernel, (partitions, max(ceil_div(D, S.BLOCK_D), 1))
        launch(kernel, grid, tensors, lookups, *sizes, tokens, *numbers, S=S, num_warps=num_warps)
    results = [dsum]
    for partial in partials:
        results.append(None if partial is None else dout.new_empty(D))
        if partial is not None:
            kernel, grid = fused_embedding_partitions_kernel, (ceil_div(D, 32),)
            launch(kernel, grid, partial, results[-1], partitions, D, ACC=S.ACC, ROWS=128, BLOCK_D=32, num_warps=8)
    return results


def _order(indices: Tensor, num_rows: int, N: int, padding_idx: int = -1) -> RowOrder:
    """The order of N tokens by rows that repeat; only one period of them is sorted."""
    order, period = order_by_row(indices, num_rows, padding_idx), indices.shape[0]
    if period == N:
        return order
    repeats = N // max(period, 1)
    first = torch.arange(repeats, device=indices.device) * period
    positions = (order.positions[:, None] + first).flatten()
    return RowOrder(positions, order.group[:, None].repeat(1, repeats).flatten(), order.starts * repeats, None)


def fused_embedding_backward(
    dout: Tensor, inputs: FusedEmbeddingInputs, stats: Tensor, options: FusedEmbeddingOptions, wants: int
) -> tuple[Tensor, ...]:
    """Gradients of the three tables and of the norm's weight and bias; the k-th is empty unless bit k of ``wants`` is
    set."""
    call, weight, norm = FusedEmbedding(inputs, options), inputs.weight, options.norm
    call.check(norm != "none")
    N, D = call.sizes[:2]
    if dout.shape != (N, D) or dout.dtype != weight.dtype or not dout.is_contiguous():
        raise ValueError("dout: expected (N, D) of weight's dtype, contiguous")
    if norm != "none" and (stats.shape != (N, 2) or stats.dtype != accumulator(weight) or not stats.is_contiguous()):
        raise ValueError("stats: expected what the forward gave")
    wanted = [wants >> k & 1 == 1 and t is not None for k, t in enumerate(inputs[:FUSED_EMBEDDING_PRIMALS])]
    grads: list[Any] = [None] * 5
    if norm == "none":
        dsum = dropout_forward(dout, options.p, options.seed) if options.p > 0 else dout
    else:
        dsum, *grads[3:] = _dsum(call, dout, stats, any(wanted[:3]), (wanted[3], wanted[4]))
    for k, (_, table, at) in enumerate(inputs.tables()):
        if wanted[k] and table is not None and at is not None:
            token, num_rows = k == 0, table.shape[0]
            order = _order(at, num_rows, N, options.padding_idx if token else -1)
            # What the row of a token counts for.
            by = dsum.new_full((N,), options.scale, dtype=accumulator(dsum)) if token and options.scale != 1 else None
            grads[k] = table_gradient(dsum, order, num_rows, by, by_freq=token and options.scale_grad_by_freq)
    return tuple(dout.new_empty(0) if grad is None else grad for grad in grads)
