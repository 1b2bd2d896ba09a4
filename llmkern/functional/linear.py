"""A linear layer, as ``torch.nn.functional`` has it: the output layer of every language model."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch, ops
from .._torch import F
from ..ops.linear import linear as linear_op
from ._overrides import overridden


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input weight^T + bias``; see :func:`torch.nn.functional.linear`.

    Args:
        input: ``(*, I)``.
        weight: ``(O, I)``; torch's ``(I)`` too.
        bias: ``(O)``. Default: none.

    Returns:
        ``(*, O)``, of the arguments' dtype. Sums are taken in fp32 (fp64 for fp64).
    """
    if overridden("linear", input, weight, bias):
        return F.linear(input, weight, bias)
    tensors = [t for t in (input, weight, bias) if t is not None]
    not_plain = dispatch.not_plain(*tensors)
    if not_plain != dispatch.NESTED and not _fits(input, weight, bias):
        return F.linear(input, weight, bias)
    rows = 0 if not_plain == dispatch.NESTED else input.numel() // input.shape[-1]
    options = [*not_plain, "autocast"] if dispatch.autocasts(input) else not_plain
    backend = dispatch.pick("linear", *tensors, options=options, products=rows * weight.numel())
    if backend == "torch":
        return F.linear(input, weight, bias)
    flat = bias if bias is None else bias.contiguous()
    y = linear_op(input.reshape(rows, weight.shape[1]).contiguous(), weight.contiguous(), flat, backend)
    return ops.as_shape(y, (*input.shape[:-1], weight.shape[0]))


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is something to do, and torch would do it."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        return False
    fits = input.dim() > 0 and weight.dim() == 2 and input.shape[-1] == weight.shape[1] and input.numel() > 0
    return fits and weight.numel() > 0 and (bias is None or bias.shape == weight.shape[:1])
