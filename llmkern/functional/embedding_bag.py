"""Embedding bags, as ``torch.nn.functional`` has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, ops
from .embedding import INDEX_DTYPES, renormalise, row_number


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxes of bags of rows of ``weight``; see :func:`torch.nn.functional.embedding_bag`.

    Args:
        input: int32 or int64 indices in ``[0, V)``: ``(B, L)``, a bag a row, or ``(N)``, cut by ``offsets``.
        weight: table ``(V, D)``.
        offsets: where each bag of a one-dimensional ``input`` begins: ``(B)``, non-decreasing, from 0.
        max_norm: looked-up rows of a larger norm are scaled down to it, in place. Default: off.
        norm_type: the p of that norm. Default: 2.
        scale_grad_by_freq: divides a row's gradient by its count in the batch; not for max. Default: off.
        mode: ``"sum"``, ``"mean"`` or ``"max"``. Default: ``"mean"``.
        sparse: the gradient of ``weight`` is a sparse tensor; not for max. Default: off.
        per_sample_weights: a factor for each index, of ``weight``'s dtype; for sum only.
        include_last_offset: ``offsets`` is ``(B + 1)`` and ends with ``N``. Default: off.
        padding_idx: a row that counts as absent; negative counts from the end. Default: none.

    Returns:
        ``(B, D)``, of ``weight``'s dtype. An empty bag gives zeros; a max goes to the first of equal rows.

    Raises:
        ValueError: if ``offsets`` decreases (on the CPU, outside compiled and transformed functions).
        RuntimeError: if ``offsets`` does not begin with 0 or ends past ``N``, or an index is outside.

    Unlike torch's, the gradient can be differentiated again (not with ``sparse`` or ``max_norm``, nor
    compiled), and on the CPU ``scale_grad_by_freq`` divides by the right counts.
    """
    values = {
        "max_norm": max_norm,
        "scale_grad_by_freq": scale_grad_by_freq,
        "sparse": sparse,
        "per_sample_weights": per_sample_weights,
        "padding_idx": padding_idx,
    }
    options = [name for name, value in values.items() if value is not None and value is not False]
    served = _is_bag_call(input, weight, offsets, mode, per_sample_weights, include_last_offset, padding_idx)
    served = served and not (mode == "max" and (scale_grad_by_freq or sparse))
    floats = [weight] if per_sample_weights is None else [weight, per_sample_weights]
    backend = "torch" if not served else dispatch.pick("embedding_bag", *floats, options=options)
    ours = served and (
        backend != "torch" or ops.stands_in_for_torch(weight, per_sample_weights, sparse, max_norm)
    )
    if not ours:
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if offsets is None:
        B, L = input.shape
        offsets, include_last_offset = torch.arange(B, dtype=input.dtype, device=input.device) * L, False
    indices = input.reshape(-1).contiguous()
    if max_norm is not None:
        renormalise(weight, indices, max_norm, norm_type)
    return ops.embedding_bag(
        weight,
        None if per_sample_weights is None else per_sample_weights.reshape(-1),
        indices,
        offsets,
        mode,
        include_last_offset,
        row_number(padding_idx, weight),
        scale_grad_by_freq,
        sparse,
        backend,
    )


def _is_bag_call(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> bool:
    """Whether torch would accept the call; raises the one error that torch does not have."""
    if weight.dim() != 2 or not weight.is_floating_point() or mode not in ("sum", "mean", "max"):
        return False
    if input.dtype not in INDEX_DTYPES or input.device != weight.device or input.is_nested:
        return False
    if input.dim() != (2 if offsets is None else 1):
        return False
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        return False
    if per_sample_weights is not None and (
        mode != "sum" or per_sample_weights.shape != input.shape or per_sample_weights.dtype != weight.dtype
    ):
        return False
    if offsets is None:
        return True
    if offsets.dim() != 1 or offsets.dtype not in INDEX_DTYPES or offsets.device != input.device:
        return False
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    if offsets.numel() == 0:
        return not include_last_offset
    if not (offsets[1:] >= offsets[:-1]).all():
        raise ValueError(
            f"embedding_bag: offsets must not decrease, but got {offsets}; each says where a bag begins"
        )
    return offsets[0].item() == 0 and offsets[-1].item() <= input.shape[0]
