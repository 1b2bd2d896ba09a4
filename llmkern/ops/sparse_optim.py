"""Steps on the rows of a table that have a gradient: they write to parameters and states, and have no gradient."""

from __future__ import annotations

from typing import Any

import torch

from ._library import define, define_scaled

_ROWS = "Tensor(a!) param, Tensor indices, Tensor values"

_sgd = define_scaled(f"sparse_sgd_step({_ROWS}, float lr, bool maximize, float grad_scale) -> ()", lambda *_: None)
_adagrad = define_scaled(
    f"sparse_adagrad_step({_ROWS}, Tensor(b!) sum, float step, float lr, float lr_decay, float eps, bool maximize,"
    " float grad_scale) -> ()",
    lambda *_: None,
)
_adam = define_scaled(
    f"sparse_adam_step({_ROWS}, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float step, float lr, float beta1,"
    " float beta2, float eps, bool maximize, float grad_scale) -> ()",
    lambda *_: None,
)
_rowwise_adagrad = define_scaled(
    f"rowwise_adagrad_step({_ROWS}, Tensor(b!) sum, float lr, float eps, bool maximize, float grad_scale) -> ()",
    lambda *_: None,
)

sparse_grad_norm = define(
    "sparse_grad_norm(Tensor indices, Tensor values, int num_rows) -> Tensor",
    lambda indices, values, num_rows: values.new_empty((), dtype=torch.float64),
)


def sparse_sgd_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.sparse_sgd_step`; the backend comes last."""
    _step(_sgd, 0, arguments)


def sparse_adagrad_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.sparse_adagrad_step`; the backend comes last."""
    _step(_adagrad, 1, arguments)


def sparse_adam_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.sparse_adam_step`; the backend comes last."""
    _step(_adam, 2, arguments)


def rowwise_adagrad_step(*arguments: Any) -> None:
    """See :func:`llmkern.reference.rowwise_adagrad_step`; the backend comes last."""
    _step(_rowwise_adagrad, 1, arguments)


def _step(op: Any, states: int, arguments: tuple[Any, ...]) -> None:
    """One step, in place. Call it without grad. The states are the ``states`` tensors after param, indices, values."""
    op(*arguments)
    # A kernel writes behind autograd's back: a graph that still needs the old values must notice.
    torch.autograd.graph.increment_version([arguments[0], *arguments[3 : 3 + states]])
