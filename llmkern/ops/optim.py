"""``llmkern::adam_step``, ``sgd_step``, ``adagrad_step``: they write to parameters and states, and have no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import define, define_scaled

_advance = define("advance(Tensor(a!)[] steps) -> float[]", lambda steps: [float(step) for step in steps])

_NUMBERS = "bool maximize, float grad_scale, str after) -> ()"

_adam_step = define_scaled(
    "adam_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] max_exp_avg_sqs, float[] steps, float lr, float beta1, float beta2, float eps,"
    f" float weight_decay, bool decoupled, {_NUMBERS}",
    lambda *args: None,
)
_sgd_step = define_scaled(
    "sgd_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, float[] steps, float lr,"
    f" float momentum, float dampening, float weight_decay, bool nesterov, {_NUMBERS}",
    lambda *args: None,
)
_adagrad_step = define_scaled(
    "adagrad_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] sums, float[] steps, float lr, float lr_decay,"
    f" float weight_decay, float eps, {_NUMBERS}",
    lambda *args: None,
)


def advance(steps: list[Tensor], backend: str) -> list[float]:
    """Counts one step more in each, and gives the counts."""
    counts = _advance(steps, backend)
    torch.autograd.graph.increment_version(steps)
    return counts


def adam_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.adam_step`; the backend comes last."""
    _step(_adam_step, 5, arguments)


def sgd_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.sgd_step`; the backend comes last."""
    _step(_sgd_step, 3, arguments)


def adagrad_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.adagrad_step`; the backend comes last."""
    _step(_adagrad_step, 3, arguments)


def _step(op: Any, lists: int, arguments: Sequence[Any]) -> None:
    """One step for all tensors, in place. Call it without grad. The first arguments are ``lists`` lists of tensors:
    parameters, gradients, states."""
    op(*arguments)
    # A kernel writes behind autograd's back: a graph that still needs the old values must notice.
    after = arguments[-2]
    written: list[list[Tensor]] = [*arguments[:1], *arguments[1 + (after == "keep") : lists]]
    for tensors in written:
        torch.autograd.graph.increment_version(tensors)
