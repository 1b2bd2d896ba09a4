"""``SGD``: torch's optimizer with one kernel call a parameter group."""

from __future__ import annotations

from typing import Any

import torch
import torch.optim
from torch import Tensor
from torch.optim.sgd import sgd

from ..ops.optim import sgd_step
from ..ops.sparse_optim import sparse_sgd_step
from ._step import Folded, Step


class SGD(Step, torch.optim.SGD):
    """Stochastic gradient descent, with momentum if asked; see :class:`torch.optim.SGD`. Same arguments and
    ``state_dict``."""

    _op = "sgd"
    _rows_op = "sparse_sgd"
    _lists = 3
    _states_come_late = True
    _torch = sgd, ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")

    def _kernel_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded, backend: str) -> None:
        params, grads, buffers = lists
        # The first step only writes to the buffer.
        steps = [1.0 if buffer is None else 2.0 for buffer in buffers] or [1.0] * len(params)
        for i, (p, buffer) in enumerate(zip(params, buffers, strict=False)):
            if buffer is None:
                buffers[i] = self.state[p]["momentum_buffer"] = torch.empty_like(p, dtype=self._state_dtype_of(p))
        numbers = (float(group[key]) for key in ("lr", "momentum", "dampening", "weight_decay"))
        flags = (group["nesterov"], group["maximize"])
        last = folded.factor(params[0].device), folded.after, backend
        sgd_step(params, grads, buffers, steps, *numbers, *flags, *last)

    def _rows_step(
        self, group: dict[str, Any], rows: Any, lists: list[list[Any]], factor: float | Tensor, backend: str
    ) -> None:
        sparse_sgd_step(*rows, float(group["lr"]), group["maximize"], factor, backend)

    def _torch_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded) -> None:
        super()._torch_step(group, lists, folded)
        params, _, buffers = lists
        for p, buffer in zip(params, buffers, strict=False):
            self.state[p]["momentum_buffer"] = buffer

    def _torch_options(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> dict[str, Any]:
        return {"has_sparse_grad": grad.is_sparse}
