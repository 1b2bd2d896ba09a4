"""Steps inside the backward: a gradient is used and freed as soon as it is complete."""

from __future__ import annotations

from typing import Any

import torch.optim
from torch import Tensor


class InBackward:
    """What :func:`in_backward` returns: :meth:`remove` ends it. A context manager that does so at its end."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._stepping = False
        self._handles: list[Any] = [optimizer.register_step_pre_hook(self._check)]
        self._handles += [
            p.register_post_accumulate_grad_hook(self._step)
            for group in optimizer.param_groups
            for p in group["params"]
        ]

    def remove(self) -> None:
        """The optimizer waits for ``step()`` again."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> InBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _check(self, *_: Any) -> None:
        if not self._stepping:
            raise RuntimeError(
                "optimizer.step(): this optimizer steps inside the backward (llmkern.optim.in_backward), where neither"
                " accumulated nor clipped nor scaled gradients exist; leave the call out, or remove() the handle and"
                " clip, accumulate and unscale before step()"
            )

    def _step(self, p: Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        if grad.requires_grad:
            raise RuntimeError(
                "llmkern.optim.in_backward: got a backward with create_graph=True, whose graph the step would change;"
                " expected a plain backward"
            )
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        group = next(group for group in groups if any(q is p for q in group["params"]))
        self._stepping = True
        # The step of this parameter alone, with all that a step brings: hooks, schedulers that count it.
        optimizer.param_groups = [{**group, "params": [p]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            self._stepping = False
        p.grad = None


def in_backward(optimizer: torch.optim.Optimizer) -> InBackward:
    """Makes ``optimizer`` step each parameter in the backward that completes its gradient, and free the gradient.

    So at most a few gradients exist at a time, and each is used while it is in the caches. ``loss.backward()`` then
    is the whole step: leave ``optimizer.step()`` out (it raises) and call schedulers after the backward.

    Args:
        optimizer: any whose parameters do not depend on one another (all but LBFGS); its parameters as they are now.

    Returns:
        A handle; ``remove()``, or leaving it as a context, ends it.

    Raises:
        ValueError: if a gradient exists already, which the next backward would add to; for an optimizer that clips.
        RuntimeError: from ``optimizer.step()``, and from a backward with ``create_graph=True``. A second backward
        through a
            kept graph raises autograd's own error, because parameters have changed.

    Not for gradient accumulation, clipping by the norm of all gradients, or a gradient scaler: each backward steps,
    at once, on what it gives.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("in_backward: LBFGS steps all parameters together; expected an elementwise optimizer")
    if getattr(optimizer, "max_grad_norm", None) is not None:
        raise ValueError(
            "in_backward: got max_grad_norm, but the norm of all gradients is known after the backward alone"
        )
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("in_backward: got parameters with gradients, to which a backward would add; zero_grad() first")
    return InBackward(optimizer)
