"""Embedding bags, as ``torch.nn.functional`` has them."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function

from .. import dispatch, ops
from .._torch import F
from ..ops.embedding import renormalise
from ..ops.embedding_bag import BagIndexError
from ..ops.embedding_bag import embedding_bag as embedding_bag_op
from ._overrides import overridden
from .embedding import INDEX_DTYPES, raise_as_torch, row_number


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
        input: int32 or int64 indices in ``[0, V)``: ``(B, L)``, a bag a row, or ``(N)``, split by ``offsets``.
        weight: table ``(V, D)``.
        offsets: where each bag of a one-dimensional ``input`` begins: ``(B)``, non-decreasing, from 0.
        max_norm: looked-up rows of a larger norm are scaled down to it, in place. Default: off.
        norm_type: the p of that norm. Default: 2.
        scale_grad_by_freq: divides a row's gradient by its count in the batch; not for max. Default: off.
        mode: ``"sum"``, ``"mean"`` or ``"max"``. Default: ``"mean"``.
        sparse: the gradient of ``weight`` is a sparse tensor; not for max. Default: off.
        per_sample_weights: a factor for each index, of ``weight``'s dtype, for sum, and, which torch lacks, for mean:
            the sum of the weighted rows, divided by their number.
        include_last_offset: ``offsets`` is ``(B + 1)`` and ends with ``N``. Default: off.
        padding_idx: a row that counts as absent; negative counts from the end. Default: none.

    Returns:
        ``(B, D)``, of ``weight``'s dtype. An empty bag gives zeros; a max goes to the first of equal rows.

    Raises:
        RuntimeError: if an index is outside ``[0, V)``, as torch says it (an IndexError with ``max_norm``; on a GPU one
            that is both), or if ``offsets`` does not begin with 0 or ends past ``N``. ``weight`` is as it was.
        ValueError: if ``offsets`` decreases.

    On the CPU, unlike torch's, the gradient can be differentiated again, and ``scale_grad_by_freq`` divides by the
    right counts. A sparse gradient is coalesced.
    """
    as_written = (
        *(input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse),
        *(per_sample_weights, include_last_offset, padding_idx),
    )
    if overridden("embedding_bag", input, weight, offsets, per_sample_weights):
        if mode == "mean" and per_sample_weights is not None:
            return handle_torch_function(embedding_bag, (input, weight, offsets, per_sample_weights), *as_written)
        return F.embedding_bag(*as_written)
    values = {
        "max_norm": max_norm,
        "scale_grad_by_freq": scale_grad_by_freq,
        "sparse": sparse,
        "per_sample_weights": per_sample_weights,
        "padding_idx": padding_idx,
        "weighted_mean": mode == "mean" and per_sample_weights is not None,
    }
    options = [name for name, value in values.items() if value is not None and value is not False]
    not_plain = dispatch.not_plain(input, weight, offsets, per_sample_weights)
    served = not_plain == dispatch.NESTED or _is_bag_call(
        input, weight, offsets, mode, per_sample_weights, include_last_offset, padding_idx
    )
    served = served and not (mode == "max" and (scale_grad_by_freq or sparse))
    if max_norm is not None or sparse:
        # torch's gradient says that it has no sparse one by frequency.
        served = served and not (sparse and scale_grad_by_freq) and not ops.traced(weight)
    floats = [weight] if per_sample_weights is None else [weight, per_sample_weights]
    backend = "torch" if not served else dispatch.pick("embedding_bag", *floats, options=[*options, *not_plain])
    if backend == "torch":
        return F.embedding_bag(*as_written)
    indices, num_bags = input.reshape(-1).contiguous(), input.shape[0]
    if offsets is not None:
        offsets, num_bags = offsets.contiguous(), offsets.shape[0] - int(include_last_offset)
        if scale_grad_by_freq and include_last_offset and backend == "reference":
            # What lies behind the last bag does not count; kernels know.
            indices = indices[: int(offsets[-1])]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights[: len(indices)]
    try:
        if max_norm is not None:
            renormalise(weight, indices, max_norm, norm_type, backend)
        return embedding_bag_op(
            weight.contiguous(),
            None if per_sample_weights is None else per_sample_weights.reshape(-1).contiguous(),
            indices,
            offsets,
            num_bags,
            mode,
            include_last_offset,
            row_number(padding_idx, weight),
            scale_grad_by_freq,
            sparse,
            backend,
        )
    except (IndexError, RuntimeError) as error:
        # Indices or offsets that are out of bounds.
        raise_as_torch(F.embedding_bag, *as_written)
        if isinstance(error, IndexError):
            raise BagIndexError(str(error)) from None
        raise


def _is_bag_call(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> bool:
    """Whether the call is well-formed, but for the values of indices and offsets."""
    if not all(
        isinstance(t, Tensor) for t in (input, weight, *(t for t in (offsets, per_sample_weights) if t is not None))
    ):
        return False
    if weight.dim() != 2 or not weight.is_floating_point() or mode not in ("sum", "mean", "max"):
        return False
    if input.dtype not in INDEX_DTYPES or input.device != weight.device:
        return False
    if input.dim() != (2 if offsets is None else 1):
        return False
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        return False
    if per_sample_weights is not None and (
        mode == "max" or per_sample_weights.shape != input.shape or per_sample_weights.dtype != weight.dtype
    ):
        return False
    if offsets is None:
        return True
    if offsets.dim() != 1 or offsets.dtype not in INDEX_DTYPES or offsets.device != input.device:
        return False
    return not (include_last_offset and offsets.shape[0] == 0)
