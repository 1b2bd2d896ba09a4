"""Embedding lookup in tables of 8 or 4 bits an element, and how such a table is made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import dispatch, ops
from .._torch import F
from ..ops.quantized_embedding import quantize_rows as quantize_rows_op
from ..ops.quantized_embedding import quantized_embedding as quantized_embedding_op
from ._overrides import overridden
from .embedding import INDEX_DTYPES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def quantize_rows(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` in ``bits`` bits an element: ``(data, scale, offset)``, where ``q * scale + offset`` stands for it.

    Args:
        weight: table ``(V, D)``, float32, float64, bfloat16 or float16, finite.
        bits: 8 or 4. Default: 8.

    Returns:
        data: uint8, ``(V, D)`` for 8 bits, ``(V, ceil(D / 2))`` for 4: element j of a row lies in the low half of byte
            j, element j + ceil(D / 2) in the high one.
        scale: float32 ``(V)``, a row's range over ``2^bits - 1``; 0 for a constant row, which stays exact
            (one of float64 to float32).
        offset: float32 ``(V)``, a row's minimum.

    Raises:
        ValueError: for other ``bits`` or shapes, and for a row with NaN or infinities; the message names it.

    **Error bound**: an element differs from what stands for it by ``scale / 2`` at most, before rounding; computing it
    rounds in float32, and once more to the result's dtype: ``scale / 2 + (2^-22 + eps) * max|row|``.
    """
    if overridden("quantized_embedding", weight):
        return handle_torch_function(quantize_rows, (weight,), weight, bits)
    if bits not in (8, 4):
        raise ValueError(f"bits: got {bits!r}, expected 8 or 4")
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(f"weight: got {weight.dtype} of shape {tuple(weight.shape)}, expected a floating table (V, D)")
    weight = weight.detach().contiguous()
    backend = dispatch.pick("quantized_embedding", weight, options=dispatch.not_plain(weight))
    data, scale, offset = quantize_rows_op(weight, bits, backend)
    unfit = "holds NaN or infinities, or spans more than float32 can; expected finite numbers"
    if torch.compiler.is_compiling():
        # No value can be looked at while a graph is made; it is when the graph runs.
        torch._assert_async(~scale.isnan().any(), f"weight: a row {unfit}")
    elif bad := scale.isnan().nonzero().flatten().tolist():
        more = f" ({len(bad)} such rows in all)" if len(bad) > 1 else ""
        raise ValueError(f"weight: row {bad[0]} {unfit}{more}")
    return data, scale, offset


def quantized_embedding(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    embedding_dim: int | None = None,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows at ``input`` of a table that :func:`quantize_rows` made: ``q * scale + offset``. For inference.

    Args:
        input: indices of any shape ``(*)``, int32 or int64, each in ``[0, V)``.
        weight: the table's data, uint8.
        scale, offset: float32 ``(V)``.
        embedding_dim: D, which for 4 bits the data does not tell if it is odd. Default: what the data has room for.
        bits: 8 or 4. Default: 8.
        dtype: of the result. Default: float32.

    Returns:
        ``(*, D)``; no gradient.

    Raises:
        IndexError: if an index is outside ``[0, V)``: "index out of range in self".
        ValueError: if the tensors do not fit together.
    """
    if overridden("quantized_embedding", *(tensors := (input, weight, scale, offset))):
        return handle_torch_function(quantized_embedding, tensors, *tensors, embedding_dim, bits, dtype)
    if input.dtype not in INDEX_DTYPES:
        return F.embedding(input, weight)  # for torch's error
    if bits not in (8, 4):
        raise ValueError(f"bits: got {bits!r}, expected 8 or 4")
    if weight.dim() != 2 or weight.dtype != torch.uint8:
        raise ValueError(f"weight: got {weight.dtype} of shape {tuple(weight.shape)}, expected uint8 (V, D * bits / 8)")
    room = weight.shape[1] * 8 // bits
    D = room if embedding_dim is None else embedding_dim
    if D not in ((room, room - 1) if bits == 4 else (room,)):
        raise ValueError(f"embedding_dim: got {D}, expected {room}{f' or {room - 1}' if bits == 4 else ''}")
    for name, t in (("scale", scale), ("offset", offset)):
        if t.dtype != torch.float32 or t.shape != weight.shape[:1]:
            raise ValueError(f"{name}: got {t.dtype} of shape {tuple(t.shape)}, expected float32 ({weight.shape[0]},)")
    if dtype not in FLOATS:
        raise ValueError(f"dtype: got {dtype}, expected a floating dtype of 16 bits or more")
    options = dispatch.not_plain(input, weight, scale, offset)
    backend = dispatch.pick("quantized_embedding", scale, offset, options=options)
    indices = input.reshape(-1).contiguous()
    table = (weight.contiguous(), scale.contiguous(), offset.contiguous())
    return ops.as_shape(quantized_embedding_op(*table, indices, D, bits, dtype, backend), (*input.shape, D))
