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

from .._groups import RNNCotangents, RNNInputs
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


def _rnn_weights(inputs: RNNInputs) -> tuple[int, int, int]:
    """A row of x meets every weight once: weights of several heads are as many numbers as they multiply."""
    projection = 0 if inputs.weight_hr is None else inputs.weight_hr.numel()
    return inputs.weight_ih.numel(), inputs.weight_hh.numel(), projection


def _rnn_forward(*arguments: Any, out_val: Any = None) -> int:
    inputs = RNNInputs(*arguments[: len(RNNInputs._fields)])
    return 2 * inputs.x.shape[:-1].numel() * sum(_rnn_weights(inputs))


def _rnn_backward(*arguments: Any, out_val: Any = None) -> int:
    first, (needs_dx, needs_dstates, needs_dweights) = len(RNNCotangents._fields), arguments[-4:-1]
    inputs = RNNInputs(*arguments[first : first + len(RNNInputs._fields)])
    of_x, of_h, projection = _rnn_weights(inputs)
    rows = inputs.x.shape[:-1].numel()
    through_time = rows * (of_h + projection)
    if not needs_dstates:
        # Nothing goes further back than the first step of a sequence.
        through_time -= inputs.hx.shape[0] * of_h
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
