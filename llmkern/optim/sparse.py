"""Optimizers for sparse gradients, as ``nn.Embedding(sparse=True)`` gives them: they step the rows that have one, and
no others.

A step costs the same however large the table is. The price: between two gradients of a row a dense optimizer would
have decayed its averages and moved it on, which these do not. They approximate the dense ones, and are named so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.optim
from torch import Tensor
from torch.optim._functional import sparse_adam

from .._facts import accumulate_dtype
from ..ops.sparse_optim import rowwise_adagrad_step, sparse_adam_step
from ._step import Folded, Step


class SparseAdam(Step, torch.optim.SparseAdam):
    """Adam on the rows that have a gradient; see :class:`torch.optim.SparseAdam`. Same arguments and ``state_dict``."""

    _rows_op = "sparse_adam"

    def _collect(self, group: dict[str, Any]) -> list[list[Any]]:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not p.grad.is_sparse:
                raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
            if len(self.state[p]) == 0:
                averages = (torch.zeros_like(p, dtype=self._state_dtype_of(p)) for _ in range(2))
                self.state[p].update(zip(("step", "exp_avg", "exp_avg_sq"), (0, *averages), strict=True))
        if self.state_dtype is not None:
            self._widen(group)
        states = [[self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq")]
        return [params, [p.grad for p in params], *states]

    def _rows_step(
        self, group: dict[str, Any], rows: Any, lists: list[list[Any]], factor: float | Tensor, backend: str
    ) -> None:
        state = self.state[lists[0][0]]
        state["step"] += 1
        averages = (state[key].view(rows[0].shape) for key in ("exp_avg", "exp_avg_sq"))
        numbers = map(float, (state["step"], group["lr"], *group["betas"], group["eps"]))
        sparse_adam_step(*rows, *averages, *numbers, group.get("maximize", False), factor, backend)

    def _torch_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded) -> None:
        params, grads, exp_avgs, exp_avg_sqs = lists
        for p in params:
            self.state[p]["step"] += 1
        beta1, beta2 = group["betas"]
        sparse_adam(
            params,
            folded.clipped(grads),
            exp_avgs,
            exp_avg_sqs,
            [self.state[p]["step"] for p in params],
            eps=group["eps"],
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            maximize=group.get("maximize", False),
        )


class LazyAdam(SparseAdam):
    """Adam on the rows that have a gradient: :class:`SparseAdam` under its other name, and as exact as that is.

    ``state_dict`` is interchangeable with that of :class:`torch.optim.SparseAdam`.
    """


class RowWiseAdagrad(Step, torch.optim.Optimizer):
    """Adagrad with one accumulator a row, the sum of mean squares of the row's gradients, on sparse gradients:

        s = s + mean(g^2);  p = p - lr g / (sqrt(s) + eps)

    as FBGEMM's ``EXACT_ROWWISE_ADAGRAD``. Its state is as small as the table is high; it approximates Adagrad.

    Args:
        params: tensors ``(V, *)`` or groups of them, whose gradients are sparse COO tensors ``(V, *)``.
        lr: learning rate. Default: 1e-2.
        eps: is added to the root. Default: 1e-10.
        initial_accumulator_value: at which s begins. Default: 0.
        maximize: ascend instead. Default: ``False``.
        max_grad_norm: as in :class:`Adam`.

    s is in float32 (float64 for float64).

    Raises:
        ValueError: for a number below 0.
        RuntimeError: from ``step``, for a dense gradient.
    """

    _rows_op = "rowwise_adagrad"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value}
        for name, number in numbers.items():
            if not number >= 0:
                raise ValueError(f"Invalid {name}: {number}; expected a number from 0")
        defaults = {**numbers, "maximize": maximize}
        # Which keeps `load_state_dict` from rounding.
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, state_dtype=torch.float32)

    def _collect(self, group: dict[str, Any]) -> list[list[Any]]:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not p.grad.is_sparse:
                raise RuntimeError("RowWiseAdagrad does not support dense gradients, please consider Adagrad instead")
            if len(self.state[p]) == 0:
                start, dtype = group["initial_accumulator_value"], accumulate_dtype(p.dtype)
                self.state[p]["sum"] = torch.full(p.shape[:1], start, dtype=dtype, device=p.device)
        return [params, [p.grad for p in params]]

    def _rows_step(
        self, group: dict[str, Any], rows: Any, lists: list[list[Any]], factor: float | Tensor, backend: str
    ) -> None:
        state_sum = self.state[lists[0][0]]["sum"]
        numbers = (float(group["lr"]), group["eps"])
        rowwise_adagrad_step(*rows, state_sum, *numbers, group["maximize"], factor, backend)
