"""Steps of a table whose rows are brought up to date when they are next used, step by step, by the dense rules."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from .optim import adagrad_step, adam_step, sgd_step


def row_lookup(
    param: Tensor,
    states: list[Tensor],
    applied: Tensor,
    history: Tensor,
    count: int,
    kind: str,
    decoupled: bool,
    maximize: bool,
    nesterov: bool,
    closed: bool,
    indices: Tensor,
) -> Tensor:
    """Rows (N, D) at ``indices`` (N) as they are after all ``count`` steps on record; nothing is written."""
    p, done, some = param.clone(), applied.clone(), [state.clone() for state in states]
    row_catch_up(p, some, done, history, count, kind, decoupled, maximize, nesterov, closed, indices)
    return p[indices.long()]


def row_catch_up(
    param: Tensor,
    states: list[Tensor],
    applied: Tensor,
    history: Tensor,
    count: int,
    kind: str,
    decoupled: bool,
    maximize: bool,
    nesterov: bool,
    closed: bool,
    indices: Tensor | None,
) -> None:
    """Makes the steps on record that rows ``indices`` (``None``: all rows) have not had.

    ``param`` (V, D); ``states`` of its shape, in the order of :mod:`llmkern.reference.optim`; ``applied`` (V) counts
    the steps that a row has had; ``history[u]`` begins with the numbers of :class:`llmkern.ops.RowStep`. A row
    without a gradient is stepped with a gradient of zeros, as a dense optimizer does. ``closed`` is of no concern
    here.
    """
    rows = torch.arange(param.shape[0], device=param.device) if indices is None else indices.long().unique()
    for u in range(count):
        due = rows[applied[rows] <= u]
        if due.numel():
            grad = param.new_zeros(due.numel(), param.shape[1])
            _dense(param, states, due, grad, history[u, :6].tolist(), kind, decoupled, maximize, nesterov)
    applied[rows] = count


def row_step(
    param: Tensor,
    states: list[Tensor],
    applied: Tensor,
    history: Tensor,
    count: int,
    kind: str,
    decoupled: bool,
    maximize: bool,
    nesterov: bool,
    closed: bool,
    indices: Tensor,
    values: Tensor,
    step: list[float],
    grad_scale: float | Tensor,
) -> bool:
    """One step on a gradient that is ``grad_scale`` times the sum of ``values`` (N, D) by ``indices`` (N). Says whether
    the step changes rows that have no gradient; it is then on record, as ``history[count]``."""
    rule = (kind, decoupled, maximize, nesterov)
    row_catch_up(param, states, applied, history, count, *rule, closed, indices)
    rows, places = indices.long().unique(return_inverse=True)
    wide = accumulate_dtype(param.dtype)
    grad = torch.zeros(rows.numel(), param.shape[1], dtype=wide, device=param.device).index_add(
        0, places, values.to(wide)
    )
    _dense(param, states, rows, grad.to(param.dtype) * grad_scale, step, *rule)
    recorded = kind == "adam" or step[5] != 0 or (kind == "sgd" and step[2] != 0)
    applied[rows] = count + recorded
    history[count, :6] = torch.tensor(step, dtype=torch.float64)
    return recorded


def _dense(
    param: Tensor,
    states: list[Tensor],
    rows: Tensor,
    grad: Tensor,
    step: list[float],
    kind: str,
    decoupled: bool,
    maximize: bool,
    nesterov: bool,
) -> None:
    p, some = param[rows], [state[rows] for state in states]
    t, lr, first, second, eps, decay = step
    if kind == "adam":
        adam_step([p], [grad], [some[0]], [some[1]], some[2:], [t], lr, first, second, eps, decay, decoupled, maximize)
    elif kind == "sgd":
        sgd_step([p], [grad], some, [t], lr, first, second, decay, nesterov, maximize)
    else:
        adagrad_step([p], [grad], some, [t], lr, first, decay, eps, maximize)
    for whole, part in zip((param, *states), (p, *some), strict=True):
        whole[rows] = part
