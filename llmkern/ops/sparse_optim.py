"""Steps on the rows of a table that have a gradient; :mod:`llmkern.reference.sparse_optim` says what they do."""

from __future__ import annotations

import torch

from ._library import define, define_step

_ROWS = "Tensor(a!) param, Tensor indices, Tensor values"
_NUMBERS = "bool maximize, float grad_scale"

sparse_sgd_step = define_step(f"sparse_sgd_step({_ROWS}, float lr, {_NUMBERS}) -> ()")
sparse_adagrad_step = define_step(
    f"sparse_adagrad_step({_ROWS}, Tensor(b!) sum, float step, float lr, float lr_decay, float eps, {_NUMBERS}) -> ()"
)
sparse_adam_step = define_step(
    f"sparse_adam_step({_ROWS}, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float step, float lr, float beta1,"
    f" float beta2, float eps, {_NUMBERS}) -> ()"
)
rowwise_adagrad_step = define_step(
    f"rowwise_adagrad_step({_ROWS}, Tensor(b!) sum, float lr, float eps, {_NUMBERS}) -> ()"
)

sparse_grad_norm = define(
    "sparse_grad_norm(Tensor indices, Tensor values, int num_rows) -> Tensor",
    lambda indices, values, num_rows: values.new_empty((), dtype=torch.float64),
)
