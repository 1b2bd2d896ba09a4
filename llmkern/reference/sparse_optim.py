"""Optimizer steps on the rows of a table that have a gradient, in place.

Common to all: row ``indices[i]`` of ``param`` (V, D) has the gradient ``values[i]``, or the sum of them if it comes
several times. Gradients are multiplied by ``grad_scale``, and negated if ``maximize``. Other rows stay as they are.
Arithmetic is in fp32 (fp64 for fp64), results are rounded once. ``step`` counts from 1.
"""

from __future__ import annotations

from torch import Tensor

from .._facts import accumulate_dtype


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def _rows(param: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that come, ascending, and the sum of each one's gradients."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < param.shape[0]:
        raise IndexError("index out of range in self")
    rows, run = indices.unique(return_inverse=True)
    wide = _wide(values)
    return rows, wide.new_zeros(rows.numel(), values.shape[1]).index_add(0, run, wide)


def sparse_sgd_step(
    param: Tensor, indices: Tensor, values: Tensor, lr: float, maximize: bool, grad_scale: float | Tensor = 1.0
) -> None:
    """p = p - lr g."""
    rows, g = _rows(param, indices, values)
    g = g * (-grad_scale if maximize else grad_scale)
    param[rows] = (_wide(param[rows]) - lr * g).to(param.dtype)


def sparse_adagrad_step(
    param: Tensor,
    indices: Tensor,
    values: Tensor,
    sum: Tensor,
    step: float,
    lr: float,
    lr_decay: float,
    eps: float,
    maximize: bool,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """s = s + g^2;  p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps): Adagrad, exactly."""
    rows, g = _rows(param, indices, values)
    g = g * (-grad_scale if maximize else grad_scale)
    s = _wide(sum[rows]) + g * g
    sum[rows] = s.to(sum.dtype)
    change = lr / (1 + (step - 1) * lr_decay) * g / (s.sqrt() + eps)
    param[rows] = (_wide(param[rows]) - change).to(param.dtype)


def sparse_adam_step(
    param: Tensor,
    indices: Tensor,
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """``torch.optim.SparseAdam``:

        m = m + (1 - beta1) (g - m);  v = v + (1 - beta2) (g^2 - v)
        p = p - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

    which is Adam but for eps, and for the rows without a gradient: their averages do not decay, and they do not move.
    """
    rows, g = _rows(param, indices, values)
    g = g * (-grad_scale if maximize else grad_scale)
    m, v = _wide(exp_avg[rows]), _wide(exp_avg_sq[rows])
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    param[rows] = (_wide(param[rows]) - step_size * (m / (v.sqrt() + eps))).to(param.dtype)


def rowwise_adagrad_step(
    param: Tensor,
    indices: Tensor,
    values: Tensor,
    sum: Tensor,
    lr: float,
    eps: float,
    maximize: bool,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """Adagrad with one accumulator a row, ``sum`` (V), as FBGEMM's ``EXACT_ROWWISE_ADAGRAD``:

    s = s + mean(g^2);  p = p - lr g / (sqrt(s) + eps)
    """
    rows, g = _rows(param, indices, values)
    g = g * (-grad_scale if maximize else grad_scale)
    sum[rows] += g.square().mean(1)
    param[rows] = (_wide(param[rows]) - lr * g / (sum[rows].sqrt() + eps)[:, None]).to(param.dtype)


def sparse_grad_norm(indices: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """The length of the whole gradient as one vector, a float64 scalar; summed in float64."""
    _, g = _rows(values.new_empty(num_rows, 0), indices, values)
    return g.double().square().sum().sqrt()
