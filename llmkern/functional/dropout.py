"""Dropout."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch, ops
from .._torch import VF, F
from ..ops.dropout import dropout as dropout_op
from ._overrides import overridden


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``input`` with each element zeroed with probability ``p``, the others scaled by 1 / (1 - p); see
    :func:`torch.nn.functional.dropout`.

    The mask is a function of a seed and of an index: it is computed anew in the backward and never stored. The
    seed comes from torch's default generator, so that ``torch.manual_seed`` determines the mask; it is another one than
    torch's own function would draw.

    Raises:
        ValueError: if ``p`` is not between 0 and 1.
    """
    if overridden("dropout", input):
        return F.dropout(input, p, training, inplace)
    # A seed is a number: the compiler would leave its graph for it, vmap has its own rules for random numbers, and a
    # CUDA graph would replay one mask.
    options = [name for name, on in (("inplace", inplace), ("traced", ops.seed_freezes())) if on]
    options += dispatch.not_plain(input)
    backend = "torch"
    counts = training is True and isinstance(p, (int, float)) and isinstance(input, Tensor)
    if counts and 0 < p <= 1 and input.numel():
        backend = dispatch.pick("dropout", input, options=options)
    if backend == "torch":
        if p < 0.0 or p > 1.0:
            # Which is torch's error.
            return F.dropout(input, p, training, inplace)
        # What torch's function calls, by a name that may be patched with this one.
        return (VF.dropout_ if inplace else VF.dropout)(input, p, training)
    return dropout_op(input, float(p), ops.draw_seed(), backend)
