"""``llmkern::adam_step``, ``sgd_step``, ``adagrad_step``; :mod:`llmkern.reference.optim` says what they do."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, define_step

_advance = define("advance(Tensor(a!)[] steps) -> float[]", lambda steps: [float(step) for step in steps])

_LISTS = "Tensor(a!)[] params, Tensor(b!)[] grads"
_NUMBERS = "bool maximize, float grad_scale, str after"

adam_step = define_step(
    f"adam_step({_LISTS}, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, float[] steps,"
    f" float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, {_NUMBERS}) -> ()"
)
sgd_step = define_step(
    f"sgd_step({_LISTS}, Tensor(c!)[] momentum_buffers, float[] steps, float lr, float momentum, float dampening,"
    f" float weight_decay, bool nesterov, {_NUMBERS}) -> ()"
)
adagrad_step = define_step(
    f"adagrad_step({_LISTS}, Tensor(c!)[] sums, float[] steps, float lr, float lr_decay, float weight_decay, float eps,"
    f" {_NUMBERS}) -> ()"
)


def advance(steps: list[Tensor], backend: str) -> list[float]:
    """Counts one step more in each, and gives the counts."""
    counts = _advance(steps, backend)
    torch.autograd.graph.increment_version(steps)
    return counts
