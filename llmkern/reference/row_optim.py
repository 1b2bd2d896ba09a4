"""Steps of a table whose rows are brought up to date when they are next used, step by step, by the dense rules."""

from __future__ import annotations

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from .._groups import LazyTable
from .optim import adagrad_step, adam_step, sgd_step


def row_lookup(table: LazyTable, indices: Tensor) -> Tensor:
    """Rows (N, D) at ``indices`` (N) as they are after all logged steps; nothing is written."""
    states = [state.clone() for state in table.states]
    table = table._replace(param=table.param.clone(), states=states, applied=table.applied.clone())
    row_catch_up(table, indices)
    return table.param[indices.long()]


def row_catch_up(table: LazyTable, indices: Tensor | None) -> None:
    """Makes the logged steps that rows ``indices`` (``None``: all rows) have not had.

    A row without a gradient is stepped with a gradient of zeros, as a dense optimizer does. ``closed`` is of no concern
    here.
    """
    param, applied = table.param, table.applied
    rows = torch.arange(param.shape[0], device=param.device) if indices is None else indices.long().unique()
    for u in range(table.logged):
        due = rows[applied[rows] <= u]
        if due.numel():
            _dense(table, due, param.new_zeros(due.numel(), param.shape[1]), table.log[u, :6].tolist())
    applied[rows] = table.logged


def row_step(table: LazyTable, indices: Tensor, values: Tensor, step: list[float], grad_scale: float | Tensor) -> bool:
    """One step on a gradient that is ``grad_scale`` times the sum of ``values`` (N, D) by ``indices`` (N). Says whether
    the step changes rows that have no gradient; it is then logged, as ``log[logged]``."""
    row_catch_up(table, indices)
    param, count = table.param, table.logged
    rows, places = indices.long().unique(return_inverse=True)
    wide = accumulate_dtype(param.dtype)
    grad = torch.zeros(rows.numel(), param.shape[1], dtype=wide, device=param.device)
    grad = grad.index_add(0, places, values.to(wide))
    _dense(table, rows, grad.to(param.dtype) * grad_scale, step)
    is_logged = table.kind == "adam" or step[5] != 0 or (table.kind == "sgd" and step[2] != 0)
    table.applied[rows] = count + is_logged
    table.log[count, :6] = torch.tensor(step, dtype=torch.float64)
    return is_logged


def _dense(table: LazyTable, rows: Tensor, grad: Tensor, step: list[float]) -> None:
    p, some = table.param[rows], [state[rows] for state in table.states]
    t, lr, first, second, eps, decay = step
    if table.kind == "adam":
        maxima, numbers = some[2:], (lr, first, second, eps, decay, table.decoupled)
        adam_step([p], [grad], [some[0]], [some[1]], maxima, [t], *numbers, table.maximize)
    elif table.kind == "sgd":
        sgd_step([p], [grad], some, [t], lr, first, second, decay, table.nesterov, table.maximize)
    else:
        adagrad_step([p], [grad], some, [t], lr, first, decay, eps, table.maximize)
    for whole, part in zip((table.param, *table.states), (p, *some), strict=True):
        whole[rows] = part
