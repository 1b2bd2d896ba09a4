"""``Adam`` and ``AdamW``: torch's optimizers with one kernel call a parameter group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.optim
from torch import Tensor
from torch.optim.adam import adam

from ..ops.optim import adam_step, advance
from ._step import Folded, Step


class _AdamStep(Step):
    _op = "adam"
    _lists = 6
    _counts = 5
    _torch = (
        adam,
        ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused"),
    )

    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        # Refuses a capture into a CUDA graph that would replay stale step counts. Older torch has the second name.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()
        return super().step(closure, zero_grad=zero_grad)

    step.__doc__ = Step.step.__doc__

    def _kernel_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded, backend: str) -> None:
        *tensors, steps = lists
        numbers = map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
        flags = (group.get("decoupled_weight_decay", False), group["maximize"])
        last = folded.factor(lists[0][0].device), folded.after, backend
        adam_step(*tensors, advance(steps, backend), *numbers, *flags, *last)

    def _torch_options(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        decoupled = group.get("decoupled_weight_decay", False)
        return {"beta1": beta1, "beta2": beta2, "decoupled_weight_decay": decoupled, "has_complex": p.is_complex()}


class Adam(_AdamStep, torch.optim.Adam):
    """Adam; see :class:`torch.optim.Adam`. Same arguments and ``state_dict``.

    Dense parameters take one kernel call for all tensors of a group; low-precision ones are updated in fp32 and rounded
    once.
    """


class AdamW(_AdamStep, torch.optim.AdamW):
    """Adam with decoupled weight decay; see :class:`torch.optim.AdamW`. As :class:`Adam` here."""
