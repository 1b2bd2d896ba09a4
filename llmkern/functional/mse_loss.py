"""Mean squared error, as ``torch.nn.functional`` has it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import _reduction

from .. import dispatch
from .._facts import accumulate_dtype
from .._torch import F
from ..ops.mse_loss import mse_loss as mse_loss_op
from ._losses import single
from ._overrides import overridden


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``(input - target)^2``, averaged or summed; see :func:`torch.nn.functional.mse_loss`.

    Args:
        input: predictions ``(*)``, float32, float64, bfloat16 or float16.
        target: ground truth ``(*)``. Another shape is broadcast, with a warning.
        size_average, reduce: deprecated; they override ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        weight: a factor ``(*)`` for each squared error; the mean divides by its sum. Default: none.

    Returns:
        A scalar, or ``(*)`` for ``"none"``, of the arguments' dtype.

    Raises:
        ValueError: for another ``reduction``, or a ``weight`` of another shape than ``input``.

    Sums are kept in fp32 (fp64 for fp64): a float16 mean overflows only if the mean itself does.
    """
    if overridden("mse_loss", input, target, weight):
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    tensors = (input, target) if weight is None else (input, target, weight)
    not_plain = dispatch.not_plain(*tensors)
    served = all(isinstance(t, Tensor) and t.is_floating_point() and t.device == input.device for t in tensors)
    served = (
        served
        and reduction in ("none", "mean", "sum")
        and (weight is None or not_plain == dispatch.NESTED or weight.shape == input.shape)
    )
    if not served:
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    # As torch's autocast treats a loss.
    cast = weight is None and dispatch.autocasts(input)
    x, t = (single(input), single(target)) if cast else (input, target)
    options = [*not_plain, *["weight"] * (weight is not None)]
    backend = dispatch.pick("mse_loss", x, t, *tensors[2:], options=options)
    if backend == "torch":
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
        x, t = torch.broadcast_tensors(x, t)
    dtype = torch.promote_types(x.dtype, t.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    # As in torch, the mean divides by the sum of the weights as they were given, not as they were broadcast.
    factors = None if weight is None else weight.expand_as(x)
    scale = _expected_gradient(x, t, reduction)
    loss = mse_loss_op(x.contiguous(), t.contiguous(), reduction != "none", factors, scale, backend)
    if reduction == "mean":
        loss = loss / (x.numel() if weight is None else weight.to(loss.dtype).sum())
    return loss.to(dtype)


def _expected_gradient(x: Tensor, t: Tensor, reduction: str) -> Tensor | None:
    """The gradient that the sum will get if the reduced loss gets 1."""
    if reduction == "none" or not (torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)):
        return None
    one = torch.ones((), dtype=accumulate_dtype(x.dtype), device=x.device)
    return one / x.numel() if reduction == "mean" else one
