"""``Adagrad``: torch's optimizer with one kernel call a parameter group."""

from __future__ import annotations

from typing import Any

import torch.optim
from torch import Tensor
from torch.optim.adagrad import adagrad

from ..ops.optim import adagrad_step, advance
from ..ops.sparse_optim import sparse_adagrad_step
from ._step import Folded, Step


class Adagrad(Step, torch.optim.Adagrad):
    """Adagrad; see :class:`torch.optim.Adagrad`. Same arguments and ``state_dict``."""

    _op = "adagrad"
    _rows_op = "sparse_adagrad"
    _lists = 4
    _counts = 3
    _torch = adagrad, ("lr", "weight_decay", "lr_decay", "eps", "foreach", "maximize", "differentiable", "fused")

    def _widen(self, group: dict[str, Any]) -> bool:
        changed = super()._widen(group)
        for state in (self.state[p] for p in group["params"] if changed and p in self.state):
            if state["step"] == 0:
                # Not the initial value that the parameter's dtype has rounded.
                state["sum"].fill_(self.defaults["initial_accumulator_value"])
        return changed

    def _kernel_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded, backend: str) -> None:
        *tensors, steps = lists
        numbers = (float(group[key]) for key in ("lr", "lr_decay", "weight_decay", "eps"))
        last = folded.factor(lists[0][0].device), folded.after, backend
        adagrad_step(*tensors, advance(steps, backend), *numbers, group["maximize"], *last)

    def _rows_step(
        self, group: dict[str, Any], rows: Any, lists: list[list[Any]], factor: float | Tensor, backend: str
    ) -> None:
        (state_sum,), steps = lists[2:]
        numbers = (float(group[key]) for key in ("lr", "lr_decay", "eps"))
        state_sum = state_sum.view(rows[0].shape)
        sparse_adagrad_step(*rows, state_sum, *advance(steps, backend), *numbers, group["maximize"], factor, backend)

    def _torch_options(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> dict[str, Any]:
        return {"has_sparse_grad": grad.is_sparse, "has_complex": p.is_complex()}
