"""Layer and root-mean-square normalisation, as ``torch.nn.functional`` has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, ops
from .._facts import accumulate_dtype
from .._torch import F
from ..ops.layer_norm import layer_norm as layer_norm_op
from ._overrides import overridden

_HALF = (torch.bfloat16, torch.float16)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias``; see :func:`torch.nn.functional.layer_norm`.

    Args:
        input: ``(*, *normalized_shape)``, float32, float64, bfloat16 or float16.
        normalized_shape: the last dimensions, over which mean and variance are taken.
        weight, bias: ``normalized_shape``, of the input's dtype, or float32 with bfloat16 and float16. Default: none.
        eps: added to the variance. Default: 1e-5.

    Returns:
        Of the input's shape and dtype. Sums are kept in fp32 (fp64 for fp64).
    """
    if overridden("layer_norm", input, weight, bias) or dispatch.small("layer_norm", input):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    y = _normalised("layer_norm", input, normalized_shape, weight, bias, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps) if y is None else y


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``input / sqrt(mean of squares + eps) * weight``; see :func:`torch.nn.functional.rms_norm`.

    Args:
        input: ``(*, *normalized_shape)``, float32, float64, bfloat16 or float16.
        normalized_shape: the last dimensions, over which the mean is taken.
        weight: ``normalized_shape``, of the input's dtype, or float32 with bfloat16 and float16. Default: none.
        eps: added to the mean. Default: the machine epsilon of float32 (float64 for float64).

    Returns:
        Of the input's shape and dtype. Sums are kept in fp32 (fp64 for fp64).
    """
    if overridden("rms_norm", input, weight) or dispatch.small("rms_norm", input):
        return F.rms_norm(input, normalized_shape, weight, eps)
    y = _normalised("rms_norm", input, normalized_shape, weight, None, eps)
    return F.rms_norm(input, normalized_shape, weight, eps) if y is None else y


def _normalised(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Tensor | None:
    """None where torch's function gets the call: for its error, or because it serves."""
    rms = op == "rms_norm"
    not_plain = dispatch.not_plain(input, weight, bias)
    if not_plain != dispatch.NESTED and not _fits(input, normalized_shape, weight, bias):
        return None
    if not (isinstance(eps, (float, int)) or (rms and eps is None)):
        return None
    # A device's autocast may know these functions; the CPU's does not.
    options = [*not_plain, "autocast"] if input.device.type != "cpu" and dispatch.autocasts(input) else not_plain
    affine = [t for t in (weight, bias) if t is not None]
    if weight is not None and input.dtype in _HALF and all(t.dtype == torch.float32 for t in affine):
        # Kernels take these; and nothing else that is mixed.
        affine = [t for t in affine if t.device != input.device]
    elements = 0 if not_plain == dispatch.NESTED else input.numel()
    graph = ops.differentiating(input, weight, bias)
    backend = dispatch.pick(op, input, *affine, options=options, elements=elements, grad=graph)
    if backend == "torch":
        return None
    if eps is None:
        eps = torch.finfo(accumulate_dtype(input.dtype)).eps
    D = math.prod(normalized_shape)
    rows = input.shape[: input.dim() - len(normalized_shape)].numel()
    vectors = [None if t is None else t.reshape(D).contiguous() for t in (weight, bias)]
    y = layer_norm_op(input.reshape(rows, D).contiguous(), vectors[0], vectors[1], float(eps), rms, backend)
    return ops.as_shape(y, input.shape)


def _fits(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch would take these arguments, but for their dtypes."""
    if not isinstance(input, Tensor) or not isinstance(normalized_shape, (tuple, list)):
        return False
    if not normalized_shape or any(type(size) not in (int, torch.SymInt) for size in normalized_shape):
        return False
    shape = tuple(normalized_shape)
    vectors = (weight, bias)
    fits = all(t is None or (isinstance(t, Tensor) and tuple(t.shape) == shape) for t in vectors)
    return fits and tuple(input.shape[-len(shape) :]) == shape
