"""Embedding lookup: the forward copies rows, the backward adds them up.

Traffic. Forward: N * D read and written once, 16 KB a program, 16 bytes a thread and load, eight loads in flight; where
rows are short a program takes several. Backward: see _table_gradient.py. Renormalisation: each row that occurs is read
once for its norm, and again, from a cache, and written if it is too long.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import _faults
from ._blocks import unit_d
from ._launch import acc_type, ceil_div, launch, require_rows
from ._row_order import block_d, order_by_row, order_distinct, run_blocks
from ._table_gradient import table_gradient, table_gradient_rows


@triton.jit(do_not_specialize=["N", "V"])
def embedding_forward_kernel(
    weight_ptr, indices_ptr, out_ptr, fault_ptr, N, V, D, column_blocks,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    D = D // UNIT * UNIT
    program = tl.program_id(0)
    n = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = n < N
    row = tl.load(indices_ptr + n, mask=inside, other=0).to(tl.int64)
    good = (row >= 0) & (row < V)
    _faults.report(inside & ~good, row, fault_ptr)
    known = (columns < D)[None, :]
    mask = (inside & good)[:, None] & known
    x = tl.load(weight_ptr + row[:, None] * D + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + n[:, None] * D + columns[None, :], x, mask=inside[:, None] & known)


@triton.jit
def _norm(row_ptr, D, p, NORM: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the row at ``row_ptr``; NaN if an element is."""
    total = tl.zeros((BLOCK_D,), ACC)
    most = tl.full((BLOCK_D,), float("-inf"), ACC)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns < D
        x = tl.abs(tl.load(row_ptr + columns, mask=inside, other=0.0).to(ACC))
        if NORM == "2":
            total += x * x
        elif NORM == "1":
            total += x
        elif NORM == "0":
            total += (x != 0).to(ACC)
        elif NORM == "p":
            total += tl.where(inside, tl.exp2(p * tl.log2(x)), 0.0)
        else:
            # A maximum loses NaN: the total keeps it.
            total += tl.where(x != x, x, 0.0)
            most = tl.maximum(most, tl.where(inside, x if NORM == "inf" else -x, float("-inf")))
    norm = tl.sum(total, 0)
    if NORM == "2":
        norm = tl.sqrt(norm)
    elif NORM == "p":
        norm = tl.exp2(tl.log2(norm) / p)
    elif NORM == "inf":
        norm += tl.max(most, 0)
    elif NORM == "-inf":
        norm -= tl.max(most, 0)
    return norm


@triton.jit(do_not_specialize=["N", "V"])
def embedding_renorm_kernel(
    weight_ptr, rows_ptr, group_ptr, N, V, D, max_norm: tl.float64, p: tl.float64,
    NORM: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    # A bad index sorts last: then no program writes.
    last = tl.load(rows_ptr + tl.load(group_ptr + N - 1)).to(tl.int64)
    if (row < V) & (last < V):
        limit = tl.full((), max_norm, ACC)
        norm = _norm(weight_ptr + row * D, D, tl.full((), p, ACC), NORM, ACC, BLOCK_D)
        if norm > limit:
            factor = limit / (norm + 1e-7)
            for first in range(0, D, BLOCK_D):
                columns = first + tl.arange(0, BLOCK_D)
                at = weight_ptr + row * D + columns
                x = tl.load(at, mask=columns < D, other=0.0).to(ACC) * factor
                tl.store(at, x.to(weight_ptr.dtype.element_ty), mask=columns < D)


def _check(rows: Tensor, name: str, indices: Tensor) -> None:
    require_rows("embedding", rows, name)
    if indices.dim() != 1 or (name == "dout" and rows.shape[0] != indices.shape[0]):
        raise ValueError(f"embedding: expected {name} ({'V' if name == 'weight' else 'N'}, D) and indices (N)")


def embedding_forward(weight: Tensor, indices: Tensor) -> Tensor:
    """``weight[indices]`` (N, D); zeros where an index is out of range, which is reported."""
    _check(weight, "weight", indices)
    (V, D), N = weight.shape, indices.shape[0]

    out = weight.new_empty((N, D))

    rows, block = run_blocks(D, weight.itemsize, 16384, 4096)
    column_blocks = ceil_div(D, block)
    launch(
        embedding_forward_kernel, (ceil_div(N, rows) * column_blocks,), weight, indices, out,
        _faults.word(_faults.EMBEDDING), N, V, D, column_blocks, ROWS=rows, BLOCK_D=block, UNIT=unit_d(D),
    )  # fmt: skip
    return out


def embedding_backward(
    dout: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """dweight (V, D): the sum of the rows of ``dout`` (N, D) that belong to each row, divided by their number if by
    frequency; zeros for ``padding_idx``."""
    _check(dout, "dout", indices)
    order = order_by_row(indices, num_weights, padding_idx)
    return table_gradient(dout, order, num_weights, by_freq=scale_grad_by_freq)


def embedding_sparse_backward(
    dout: Tensor, indices: Tensor, num_weights: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """The same for the rows that occur, but padding: rows (R), ascending, and values (R, D). Waits for R."""
    _check(dout, "dout", indices)
    order = order_distinct(indices, num_weights, padding_idx)
    return table_gradient_rows(dout, order, num_weights)


def embedding_renorm_(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> None:
    """Scales the rows that occur and whose norm exceeds ``max_norm`` by ``max_norm / (norm + 1e-7)``, each once. If an
    index is out of range nothing is written."""
    _check(weight, "weight", indices)
    (V, D), N = weight.shape, indices.shape[0]

    order = order_distinct(indices, V)

    norm = f"{norm_type:g}" if norm_type in (0, 1, 2, math.inf, -math.inf) else "p"
    launch(
        embedding_renorm_kernel, (N,), weight, order.rows, order.group, N, V, D, float(max_norm),
        float(norm_type), NORM=norm, ACC=acc_type(weight), BLOCK_D=2 * block_d(D),
    )  # fmt: skip
