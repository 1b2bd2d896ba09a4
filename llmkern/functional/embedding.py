"""Embedding lookup, as ``torch.nn.functional`` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from .._torch import F
from ..ops import RowParameter
from ..ops.embedding import embedding as embedding_op
from ..ops.embedding import renormalise
from ._overrides import overridden

INDEX_DTYPES = (torch.int64, torch.int32)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight`` at ``input``; see :func:`torch.nn.functional.embedding`.

    Args:
        input: indices of any shape ``(*)``, int32 or int64, each in ``[0, V)``.
        weight: table ``(V, D)``.
        padding_idx: a row that gets no gradient; negative counts from the end. Default: none.
        max_norm: looked-up rows of a larger norm are scaled down to it, in place. Default: off.
        norm_type: the p of that norm. Default: 2.
        scale_grad_by_freq: divides a row's gradient by its count in the batch. Default: ``False``.
        sparse: the gradient of ``weight`` is a sparse tensor, coalesced, without padding. Default: ``False``.

    Returns:
        ``(*, D)``, of ``weight``'s dtype.

    Raises:
        IndexError: if an index is outside ``[0, V)``, as torch says it, also where torch's is a RuntimeError (a table
            without rows). ``weight`` is as it was.

    The gradient adds duplicates up in fp32 (fp64 for fp64), in the order of the batch: bf16 sums do not
    saturate, as torch's do.
    """
    if overridden("embedding", input, weight):
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if issubclass(type(weight), RowParameter):
        if torch.jit.is_tracing():
            table: Any = weight
            table.expose()
        # Transforms know no sparse gradient; `max_norm` and frequencies are of the dense one, which is as any table's.
        transformed = torch._C._are_functorch_transforms_active()
        if transformed or (max_norm is None and not scale_grad_by_freq):
            return F.embedding(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse or not transformed
            )
    options = []
    if padding_idx is not None:
        options.append("padding_idx")
    if max_norm is not None:
        options.append("max_norm")
    if scale_grad_by_freq:
        options.append("scale_grad_by_freq")
    if sparse:
        options.append("sparse")
    not_plain = dispatch.not_plain(input, weight)
    served = isinstance(input, Tensor) and isinstance(weight, Tensor)
    served = served and weight.dim() == 2 and input.dtype in INDEX_DTYPES and input.device == weight.device
    if padding_idx is not None and not_plain != dispatch.NESTED:
        served = served and -weight.shape[0] <= padding_idx < weight.shape[0]
    if max_norm is not None or sparse:
        # torch's gradient says that it has no sparse one by frequency.
        served = served and not (sparse and scale_grad_by_freq) and not ops.traced(weight)
    backend = "torch" if not served else dispatch.pick("embedding", weight, options=[*options, *not_plain])
    if backend == "torch":
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    indices = input.reshape(-1).contiguous()
    row = row_number(padding_idx, weight)
    try:
        if max_norm is not None:
            renormalise(weight, indices, max_norm, norm_type, backend)
        out = embedding_op(weight.contiguous(), indices, row, scale_grad_by_freq, sparse, backend)
    except IndexError:
        raise_as_torch(F.embedding, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        raise
    return ops.as_shape(out, (*input.shape, weight.shape[1]))


def raise_as_torch(function: Callable[..., Tensor], input: Tensor, weight: Tensor, *arguments: Any) -> None:
    """Raises what torch's ``function`` says of a call that a kernel refused: its texts differ from path to path.

    ``weight`` stays as it is: the second of ``arguments`` is max_norm. On a GPU torch would end the context.
    """
    if not input.is_cuda:
        with torch.no_grad():
            function(input, weight if arguments[1] is None else weight.detach().clone(), *arguments)


def row_number(padding_idx: int | None, weight: Tensor) -> int:
    """A row number, or -1 for none."""
    if padding_idx is None:
        return -1
    return padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
