"""``Adam`` and ``AdamW``: torch's optimizers with one kernel call a parameter group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.optim
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from .. import dispatch, ops


class _Step(torch.optim.Optimizer):
    """The step of both. States, groups, checks and ``state_dict`` are torch's, and so is the step of a group that no
    kernel serves: sparse, complex or non-contiguous tensors, a tensor as learning rate, ``foreach``, ``fused``,
    ``capturable`` or ``differentiable`` asked for."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters once. ``closure`` recomputes and returns the loss, as in torch."""
        # Refuses a capture into a CUDA graph that would replay stale step counts. Older torch has the second name.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                lists: list[list[Any]] = [[], [], [], [], [], []]
                has_complex = self._init_group(group, *lists)  # type: ignore[attr-defined]
                if lists[0]:
                    self._step_group(group, lists, has_complex)
        return loss

    def _step_group(self, group: dict[str, Any], lists: list[list[Any]], has_complex: bool) -> None:
        params, grads, avgs, squares, maxima, steps = lists
        everything = [*params, *grads, *avgs, *squares, *maxima]
        backend = dispatch.pick("adam", *everything, options=_options(group, everything))
        beta1, beta2 = group["betas"]
        decoupled = group.get("decoupled_weight_decay", False)
        if backend != "torch":
            torch._foreach_add_(steps, 1)
            numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            counts = [float(step) for step in steps]
            ops.adam_step(params, grads, avgs, squares, maxima, counts, *numbers, decoupled, group["maximize"], backend)
            return
        keys = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
        torch_adam(
            params,
            grads,
            avgs,
            squares,
            maxima,
            steps,
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            decoupled_weight_decay=decoupled,
            **{key: group[key] for key in keys},
        )


def _options(group: dict[str, Any], tensors: list[Tensor]) -> list[str]:
    used = {key: bool(group[key]) for key in ("weight_decay", "amsgrad", "maximize")}
    used |= {key: bool(group[key]) for key in ("foreach", "fused", "capturable", "differentiable")}
    numbers = (group["lr"], *group["betas"])
    used["a tensor as learning rate or beta"] = any(isinstance(number, Tensor) for number in numbers)
    dense = [t for t in tensors if t.layout == torch.strided]
    used["sparse gradients"] = len(dense) < len(tensors)
    used["complex tensors"] = any(t.is_complex() for t in tensors)
    used["non-contiguous tensors"] = not all(t.is_contiguous() for t in dense)
    return [name for name, on in used.items() if on]


class Adam(_Step, torch.optim.Adam):
    """Adam; see :class:`torch.optim.Adam`. Same arguments and ``state_dict``.

    Dense parameters on the CPU take one native pass over all tensors of a group; low-precision ones are updated in
    fp32 and rounded once.
    """


class AdamW(_Step, torch.optim.AdamW):
    """Adam with decoupled weight decay; see :class:`torch.optim.AdamW`. As :class:`Adam` here."""
