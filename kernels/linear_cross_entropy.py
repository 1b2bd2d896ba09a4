"""Linear layer and cross-entropy as one: the N*V logits are never there as a whole.

The products are torch's (cuBLAS), and so is their precision; between them one kernel per chunk of logits makes what
`cross_entropy` makes, and the gradient takes the logits' place. In units of 2NHV operations a product, two ways:

    chunks of rows (3 products)         blocks of columns (4 products)
      logits = x[rows] W^T                logits = x W[columns]^T, to the states of the rows
      outputs, dlogits in place           outputs from the states; then for each block again
      dx[rows] = dlogits W                  logits = x W[columns]^T, dlogits in place
      dW += dlogits^T x[rows]               dW[columns] = dlogits^T x,  dx += dlogits W[columns]

Chunks take fewer operations, and read and write dW for each of them: they have to be tall; and where x is narrower
than fp32, a sum over several takes 4 VH bytes beside the result. Blocks write dW once, from one product over all rows,
and take 4 NH bytes for dx. So chunks are taken where the workspace holds tall ones, blocks where it does not
(:func:`plan`). For N 8192, H 4096, V 128256 in bf16, beside gradients of 1.04 GiB: blocks of 4096 columns 0.19 GiB,
chunks of 1024 rows 2.20, of all rows (one needs no sum) 1.96.

Ignored rows are not read by the row kernels and have gradients of zero, but the products take them along: how many
there are only the GPU knows, and cuBLAS is told sizes by the host. Gathering the others first would make no product
smaller.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._groups import LossOptions
from ._launch import accumulator, ceil_div
from ._softmax_blocks import ColumnBlocks
from ._softmax_rows import Cotangents, Loss, Outputs
from .cross_entropy import compute

# Rows that make a chunk tall: one pass over a dW in fp32 takes as long as the products of some 200 rows.
_TALL = 1024


class Plan(NamedTuple):
    """``size`` rows a chunk, or columns a block."""

    by_rows: bool
    size: int


def plan(N: int, V: int, itemsize: int, workspace: int) -> Plan:
    """Chunks if the workspace holds all rows, or 1024, or more rows than a block would have columns; else blocks."""
    rows, columns = (max(workspace // (n * itemsize), 1) for n in (V, max(N, 1)))
    by_rows = rows >= min(N, _TALL) or rows >= columns
    whole, most = (N, rows) if by_rows else (V, columns)
    size = ceil_div(whole, ceil_div(whole, most))
    if 128 <= size < whole:
        # What tensor cores like.
        up = ceil_div(size, 128) * 128
        size = up if up <= most else up - 128
    return Plan(by_rows, size)


class Gradients(NamedTuple):
    """None where not wanted."""

    x: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    target: Tensor | None

    @classmethod
    def empty(cls, x: Tensor, linear_weight: Tensor, target: Tensor, *need: bool) -> Gradients:
        shapes = (x, linear_weight, linear_weight[:, 0], target)
        return cls(*(t.new_empty(t.shape) if wanted else None for t, wanted in zip(shapes, need, strict=True)))

    def filled(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """As ops return them: what is not wanted is empty."""
        return tuple(t.new_empty(0) if g is None else g for g, t in zip(self, (x, x, x, target), strict=True))


class _Layer(NamedTuple):
    x: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V)

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        x, weight = self.x[rows], self.weight[columns].t()
        if self.bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(self.bias[columns], x, weight, out=out)


@cache
def _adds_to_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16 bits to a sum in fp32 in one go: some versions ask for a narrow sum."""
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(narrow.float(), narrow, narrow, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a b, or out += a b. ``out`` may be wider than a and b: then nothing is rounded on the way."""
    if out.dtype != a.dtype and a.device.type != "cpu":
        if add and _adds_to_wider(a.device, a.dtype):
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        elif add:
            out += torch.mm(a, b, out_dtype=out.dtype)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _wide(gradient: Tensor | None, several: bool) -> Tensor | None:
    """Where a gradient is summed over several parts: itself, or a tensor in the type of sums."""
    if gradient is None or not several or gradient.dtype == accumulator(gradient):
        return gradient
    return gradient.new_empty(gradient.shape, dtype=accumulator(gradient))


def _narrow(gradient: Tensor | None, wide: Tensor | None) -> None:
    if gradient is not None and wide is not None and wide is not gradient:
        gradient.copy_(wide)


def _part(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def _by_rows(
    layer: _Layer, loss: Loss, size: int, outputs: Outputs, cotangents: Cotangents, gradients: Gradients
) -> None:
    N, V = layer.x.shape[0], loss.V
    needs_logits = any(g is not None for g in gradients[:3])
    several = size < N
    weight, bias = _wide(gradients.linear_weight, several), _wide(gradients.linear_bias, several)
    logits = layer.x.new_empty((min(size, N), V))
    for first in range(0, N, size):
        rows, add = slice(first, min(first + size, N)), first > 0
        chunk = logits[: rows.stop - first]
        layer.logits(rows, slice(0, V), chunk)
        compute(
            chunk, loss._replace(target=loss.target[rows]), Outputs(*(_part(t, rows) for t in outputs)),
            Cotangents(*(_part(t, rows) for t in cotangents)), chunk if needs_logits else None,
            _part(gradients.target, rows),
        )  # fmt: skip
        if gradients.x is not None:
            torch.mm(chunk, layer.weight, out=gradients.x[rows])
        if weight is not None:
            _multiply(weight, chunk.t(), layer.x[rows], add)
        if bias is not None:
            sums = torch.sum(chunk, 0, dtype=bias.dtype)
            bias.add_(sums) if add else bias.copy_(sums)
    _narrow(gradients.linear_weight, weight)
    _narrow(gradients.linear_bias, bias)


def _by_columns(
    layer: _Layer, loss: Loss, size: int, outputs: Outputs, cotangents: Cotangents, gradients: Gradients
) -> None:
    N, V = layer.x.shape[0], loss.V
    parts = [slice(first, min(first + size, V)) for first in range(0, V, size)]
    every, memory = slice(0, N), layer.x.new_empty(N * min(size, V))

    def logits_of(columns: slice) -> Tensor:
        width = columns.stop - columns.start
        block = memory[: N * width].view(N, width)
        layer.logits(every, columns, block)
        return block

    entropy = outputs.entropy is not None or cotangents.entropy is not None
    widths = [columns.stop - columns.start for columns in parts]
    blocks = ColumnBlocks(loss, layer.x, N, widths, entropy, outputs.argmax is not None)
    for columns in parts:
        block = logits_of(columns)
        blocks.read(block, columns.start)
    blocks.combine(cotangents, outputs)
    if all(g is None for g in gradients):
        return
    needs_logits = any(g is not None for g in gradients[:3])
    dx = _wide(gradients.x, len(parts) > 1)
    # Backwards: the logits of the last block are still there.
    for columns in reversed(parts):
        last = columns is parts[-1]
        block = block if last else logits_of(columns)
        blocks.gradient(block, block if needs_logits else None, columns.start, gradients.target)
        if gradients.linear_weight is not None:
            torch.mm(block.t(), layer.x, out=gradients.linear_weight[columns])
        if gradients.linear_bias is not None:
            gradients.linear_bias[columns].copy_(torch.sum(block, 0, dtype=accumulator(block)))
        if dx is not None:
            _multiply(dx, block, layer.weight[columns], not last)
    _narrow(gradients.x, dx)


def _compute(
    layer: _Layer, loss: Loss, workspace: int, outputs: Outputs, cotangents: Cotangents, gradients: Gradients
) -> None:
    N, H = layer.x.shape
    if layer.weight.shape != (loss.V, H):
        raise ValueError("linear_cross_entropy: expected x (N, H) and linear_weight (V, H)")
    if loss.target.numel() != (N * loss.V if loss.soft else N):
        raise ValueError("linear_cross_entropy: expected a target for every row, or probabilities (N, V)")
    if N == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    by_rows, size = plan(N, loss.V, layer.x.element_size(), workspace)
    (_by_rows if by_rows else _by_columns)(layer, loss, size, outputs, cotangents, gradients)


def linear_cross_entropy_forward(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor | None,
    options: LossOptions,
    workspace: int,
    entropy: bool,
    argmax: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_target: bool,
) -> tuple[Tensor, ...]:
    """loss, lse, entropy and argmax of each row of x (N, H), and for ``dloss`` the gradients of x, linear_weight
    (V, H), linear_bias (V) and of probabilities; what is not wanted is empty. Everything contiguous."""
    loss = Loss(target, weight, linear_weight.shape[0], options)
    outputs = Outputs.empty(x, x.shape[:1], entropy, argmax)
    gradients = Gradients.empty(x, linear_weight, target, need_x, need_weight, need_bias, need_target)
    layer = _Layer(x, linear_weight, linear_bias)
    _compute(layer, loss, workspace, outputs, Cotangents(dloss), gradients)
    return *outputs.filled(), *gradients.filled(x, target)


def linear_cross_entropy_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    workspace: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_target: bool,
) -> tuple[Tensor, ...]:
    """The gradients of x, linear_weight, linear_bias and of probabilities; what is not wanted is empty."""
    loss = Loss(target, weight, linear_weight.shape[0], options)
    gradients = Gradients.empty(x, linear_weight, target, need_x, need_weight, need_bias, need_target)
    layer = _Layer(x, linear_weight, linear_bias)
    _compute(layer, loss, workspace, Outputs(), Cotangents(dloss, dlse, dentropy), gradients)
    return gradients.filled(x, target)
