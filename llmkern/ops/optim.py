"""``llmkern::adam_step``: writes to parameters and states, and has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define

_adam_step = define(
    "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, float[] steps, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool decoupled, bool maximize, str backend) -> ()",
    lambda *args: None,
)


def adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    backend: str,
) -> None:
    """One step for all tensors, in place; see :func:`llmkern.reference.adam_step`. Call it without grad."""
    options = (steps, lr, beta1, beta2, eps, weight_decay, decoupled, maximize)
    _adam_step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, *options, backend)
    # A kernel writes behind autograd's back: a graph that still needs the old values must notice.
    for tensor in (*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs):
        torch.autograd.graph.increment_version(tensor)
