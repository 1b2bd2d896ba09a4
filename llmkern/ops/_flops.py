"""What our ops count for in ``torch.utils.flop_counter``: two for each product of two numbers, as torch counts.

torch counts products of matrices and nothing else, so a lookup or a loss from logits is 0 for both. A formula counts
what its op multiplies: a gradient that nobody wants costs nothing, logits that are computed a second time cost twice.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._when_loaded import when_loaded

_COUNTER = "torch.utils.flop_counter"


def _linear_forward(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * x.shape[0] * weight.numel()


def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, *_: Any, out_val: Any = None
) -> int:
    return 2 * x.shape[0] * weight.numel() * (need_x + need_weight)


# The last arguments: need_x, need_weight, need_bias, need_target, backend.
def _loss_forward(x: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return 2 * x.shape[0] * linear_weight.numel() * (1 + rest[-5] + rest[-4])


def _loss_backward(
    dloss: Any, dlse: Any, dentropy: Any, x: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None
) -> int:
    return _loss_forward(x, linear_weight, *rest)


def _rnn_forward(
    x: Tensor, hx: Tensor, cx: Any, weight_ih: Tensor, weight_hh: Tensor, b: Any, c: Any, weight_hr: Any, *_: Any,
    out_val: Any = None,
) -> int:  # fmt: skip
    """A row of x meets every weight once: weights of several heads are as many numbers as they multiply."""
    weights = weight_ih.numel() + weight_hh.numel() + (0 if weight_hr is None else weight_hr.numel())
    return 2 * x.shape[:-1].numel() * weights


def _rnn_backward(a: Any, b: Any, c: Any, d: Any, x: Tensor, hx: Tensor, *rest: Any, out_val: Any = None) -> int:
    weights, (needs_dx, needs_dstates, needs_dweights) = (rest[1], rest[2], rest[5]), rest[-4:-1]
    of_x, of_h, projection = (0 if w is None else w.numel() for w in weights)
    rows = x.shape[:-1].numel()
    through_time = rows * (of_h + projection)
    if not needs_dstates:
        # Nothing goes further back than the first step of a sequence.
        through_time -= hx.shape[0] * of_h
    return 2 * (through_time + rows * of_x * needs_dx + rows * (of_x + of_h + projection) * needs_dweights)


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_forward": _linear_forward,
    "linear_backward": _linear_backward,
    "linear_cross_entropy_forward": _loss_forward,
    "linear_cross_entropy_backward": _loss_backward,
    "rnn_forward": _rnn_forward,
    "rnn_backward": _rnn_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        packet = getattr(torch.ops.llmkern, name)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet, get_raw=True)(formula)


def count_flops() -> None:
    """Makes torch's counter count our ops. It imports triton, which takes longer than all of llmkern."""
    when_loaded(_COUNTER, _register)
