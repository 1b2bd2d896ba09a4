"""What all optimizers here have in common: one kernel call a group, and what is folded into it.

States, groups, checks and ``state_dict`` are torch's, and so is the step of what no kernel serves: sparse, complex or
non-contiguous tensors, ``capturable``, ``differentiable``. ``foreach`` and ``fused`` name implementations of torch's; a
kernel stands in for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.optim
from torch import Tensor

from .. import dispatch
from .._signature import FullSignature
from .._torch_tree import Replaces
from ..functional.grad_norm import by_backend, clip_factor, total_norm
from . import _rows


@dataclass(frozen=True)
class Folded:
    """What a step does besides: ``clip`` is a factor for the gradients, in float64; the tensors are GradScaler's."""

    clip: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    zero_grad: bool = False

    def factor(self, device: torch.device) -> float | Tensor:
        """What gradients on this device are multiplied by. A tensor stays there: nobody waits for its value."""
        if self.grad_scale is None:
            return 1.0 if self.clip is None else self.clip.to(device)
        scale = self.grad_scale.to(device).double()
        return 1 / scale if self.clip is None else self.clip.to(device) / scale

    @property
    def after(self) -> str:
        """What becomes of the gradients. torch's fused steps leave them unscaled, too."""
        return "zero" if self.zero_grad else "keep" if self.grad_scale is None else "scale"

    @cached_property
    def skipped(self) -> bool:
        """Waits for the GPU, once a step, as GradScaler itself does for optimizers that are not ``fused``: the counts
        of steps, which a skipped one leaves alone, are on the host."""
        return self.found_inf is not None and bool(self.found_inf)

    def clipped(self, grads: list[Tensor]) -> list[Tensor]:
        """For a step that cannot fold: the gradients themselves stay as they are."""
        return grads if self.clip is None else [grad * self.clip.to(grad.device) for grad in grads]


class Step(torch.optim.Optimizer, Replaces):
    """Beside torch's arguments, all optimizers here take:

    Args:
        max_grad_norm: clips the gradients, all groups' as one vector, to this norm inside the step: as
            :func:`llmkern.optim.clip_grad_norm_` before it, but without writing to them. The norm is in ``grad_norm``
            afterwards. Default: ``None``, no clipping.
        state_dtype: ``torch.float32`` keeps the states of narrower parameters in float32. torch's optimizers load them,
            and round them. Default: ``None``: each parameter's own dtype, as in torch.

    Both belong to the optimizer, not to a group, and do not appear in ``state_dict``.
    """

    _op: str
    _rows_op: str
    # How many lists torch's `_init_group` fills, and which of them is that of step counts; states come before.
    _lists: int
    _counts: int | None = None
    # Whether states are None before the first step.
    _states_come_late = False
    # torch's function, and the entries of a group that are its arguments.
    _torch: tuple[Callable[..., None], tuple[str, ...]]
    max_grad_norm: float | None = None
    state_dtype: torch.dtype | None = None
    # Of the last step that clipped.
    grad_norm: Tensor | None = None
    __signature__ = FullSignature()

    def __init__(
        self,
        params: Any,
        *arguments: Any,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}; expected a number above 0, or None")
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"Invalid state_dtype: {state_dtype}; expected torch.float32 or None")
        self.max_grad_norm, self.state_dtype = max_grad_norm, state_dtype
        super().__init__(params, *arguments, **options)

    def catch_up(self) -> None:
        """Makes the steps that rows have not had yet (``llmkern.nn.Embedding(row_grad=True)``), on parameters
        and states. Whatever reads them through torch does it by itself; docs/differences.md lists what does not."""
        _rows.catch_up(self)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`torch.optim.Optimizer.state_dict`."""
        saved = super().state_dict()
        return {**saved, "state": {key: _rows.plain(state) for key, state in saved["state"].items()}}

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "state_dtype": self.state_dtype}

    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Updates the parameters once.

        Args:
            closure: recomputes and returns the loss, as in torch.
            zero_grad: fills the gradients with zeros in the same pass: ``zero_grad(set_to_none=False)``, but cheaper.

        After ``GradScaler`` found an infinity, parameters, states and step counts stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        folded = Folded(self._clip(scale), scale, found_inf, zero_grad)
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            if not folded.skipped:
                for group in self.param_groups:
                    _rows.step(self, group, folded.factor, folded.after == "scale")
            parts = [(group, lists) for group in self.param_groups for lists in _by_kind(self._collect(group))]
            zeroed = [self._serve(group, lists, folded) for group, lists in parts]
        if zero_grad and not all(zeroed):
            self.zero_grad(set_to_none=False)
        return loss

    @torch.no_grad()
    def _clip(self, scale: Tensor | None) -> Tensor | None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is None or not grads:
            return None
        norm = total_norm(by_backend(grads))
        self.grad_norm = norm if scale is None else norm / scale.to(norm)
        return clip_factor(self.grad_norm, self.max_grad_norm)

    def _collect(self, group: dict[str, Any]) -> list[list[Any]]:
        """Parameters with a gradient, their gradients, states and, where there are, step counts: torch's lists."""
        lists: list[list[Any]] = [[] for _ in range(self._lists)]
        self._init_group(_rows.without(group), *lists)  # type: ignore[attr-defined]
        if self.state_dtype is not None and self._widen(group):
            return self._collect(group)
        return lists

    def _widen(self, group: dict[str, Any]) -> bool:
        """Brings states that torch made or loaded into ``state_dtype``; says whether there were any."""
        changed = False
        for p in group["params"]:
            for key, value in self.state.get(p, {}).items():
                wide = self._state_dtype_of(p)
                if key != "step" and isinstance(value, Tensor) and value.dtype != wide:
                    self.state[p][key] = value.to(wide)
                    changed = True
        return changed

    def _state_dtype_of(self, p: Tensor) -> torch.dtype:
        return p.dtype if self.state_dtype is None else torch.promote_types(p.dtype, self.state_dtype)

    def _serve(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded) -> bool:
        """Steps one kind of tensors; says whether it has zeroed the gradients as well."""
        if lists[1][0].is_sparse:
            for i in range(len(lists[0])):
                self._serve_rows(group, [part[i : i + 1] for part in lists], folded)
            return False
        params, grads = lists[:2]
        others, counts = self._others(lists)
        fit = _fit(params, others, counts)
        tensors = [*params, *(t for each in others for t in each)] if fit else [*params, *grads]
        backend = dispatch.pick(self._op, params[0], grads[0], options=_options(group, tensors, fit))
        self._place_counts(group, lists, backend)
        if backend == "torch":
            self._torch_step(group, lists, folded)
        elif not folded.skipped:
            self._kernel_step(group, lists, folded, backend)
        return backend != "torch" and folded.after == "zero" and not folded.skipped

    def _others(self, lists: list[list[Any]]) -> tuple[list[list[Any]], list[Any]]:
        """Gradients and states, and step counts."""
        others = [each for each in lists[1 : self._counts] if each]
        if self._states_come_late:
            others = [[p if t is None else t for p, t in zip(lists[0], each, strict=True)] for each in others]
        return others, [] if self._counts is None else lists[self._counts]

    def _serve_rows(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded) -> None:
        """Steps the rows of one table that a sparse gradient names."""
        (p,), (grad,) = lists[:2]
        values, (others, counts) = grad._values(), self._others(lists)
        fit = _fit([p], others, counts)
        tensors = [p, values, *(t for each in others[1:] for t in each)] if fit else [p, values]
        options = [*_options(group, tensors, fit), *(key for key in ("momentum", "weight_decay") if group.get(key))]
        options += ["several sparse dimensions"] * (grad.sparse_dim() != 1)
        backend = dispatch.pick(self._rows_op, p, values, options=options)
        self._place_counts(group, lists, backend)
        if backend == "torch":
            self._torch_step(group, lists, folded)
        elif not folded.skipped:
            width = math.prod(p.shape[1:])
            rows = (p.view(len(p), width), grad._indices()[0], values.view(len(values), width))
            factor = folded.factor(p.device)
            self._rows_step(group, rows, lists, factor, backend)
            if folded.after == "scale":
                values.mul_(factor)

    def _place_counts(self, group: dict[str, Any], lists: list[list[Any]], backend: str) -> None:
        """Step counts are on the host, where kernels need them. torch has those of ``capturable`` and ``fused`` beside
        the parameters, and makes and loads them there."""
        if self._counts is None or lists[0][0].device.type == "cpu":
            return
        beside = backend == "torch" and (group.get("capturable") or group.get("fused"))
        for i, (p, step) in enumerate(zip(lists[0], lists[self._counts], strict=True)):
            home = p.device if beside else torch.device("cpu")
            if step.device != home:
                lists[self._counts][i] = self.state[p]["step"] = step.to(home)

    def _kernel_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded, backend: str) -> None:
        raise NotImplementedError

    def _rows_step(
        self,
        group: dict[str, Any],
        rows: tuple[Tensor, Tensor, Tensor],
        lists: list[list[Any]],
        factor: float | Tensor,
        backend: str,
    ) -> None:
        """``rows``: parameter (V, D), indices (N) and values (N, D)."""
        raise NotImplementedError

    def _torch_step(self, group: dict[str, Any], lists: list[list[Any]], folded: Folded) -> None:
        params, grads, *rest = lists
        function, keys = self._torch
        options = {key: group[key] for key in keys} | self._torch_options(group, params[0], grads[0])
        scaler = {"grad_scale": folded.grad_scale, "found_inf": folded.found_inf}
        function(params, folded.clipped(grads), *rest, **options, **scaler)

    def _torch_options(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> dict[str, Any]:
        """Arguments of torch's function that are not entries of the group."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`torch.optim.Optimizer.load_state_dict`; ``state_dtype`` spares states torch's rounding."""
        self.catch_up()
        loaded: dict[str, Any] = {}
        # The last to see what other hooks made of it.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if self.state_dtype is None:
            return
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if name != "step" and isinstance(value, Tensor):
                    self.state[p][name] = value.to(device=p.device, dtype=self._state_dtype_of(p))


def _options(group: dict[str, Any], tensors: list[Tensor], fit: bool) -> list[str]:
    """What a kernel may not serve; the parameter comes first."""
    used = {key: bool(group.get(key)) for key in ("capturable", "differentiable")}
    used["state_dtype"] = fit and len({t.dtype for t in tensors}) > 1
    used["tensors that do not fit together"] = not fit
    used["complex tensors"] = tensors[0].is_complex()
    not_plain = dispatch.not_plain(*tensors)
    used["non-contiguous tensors"] = not (not_plain or all([t.is_contiguous() for t in tensors]))  # noqa: C419
    return [*not_plain, *(name for name, on in used.items() if on)]


def _fit(params: list[Tensor], others: list[list[Any]], counts: list[Any]) -> bool:
    """Whether gradients and states are on the device of their parameters, have their shapes and dtypes that go with
    them, and step counts are numbers. torch says of others what is wrong."""
    shapes, kind = [p.shape for p in params], (params[0].dtype, params[0].device)
    try:
        if any([each.shape for each in list_] != shapes for list_ in others):
            return False
        kinds = {(t.dtype, t.device) for list_ in others for t in list_} - {kind}
        numbers = all([t.is_floating_point() and t.numel() == 1 for t in counts])  # noqa: C419
    except AttributeError:
        return False
    return numbers and (not kinds or (kinds == {(torch.float32, kind[1])} and kind[0] != torch.float64))


def _by_kind(lists: list[list[Any]]) -> list[list[list[Any]]]:
    """The lists split by device, dtypes and layout of the gradient; a list may be empty."""
    kinds: dict[Any, list[int]] = {}
    for i, (p, grad) in enumerate(zip(*lists[:2], strict=True)):
        kinds.setdefault((p.device, p.dtype, grad.dtype, grad.layout), []).append(i)
    if len(kinds) == 1:
        return [lists]
    return [[[each[i] for i in members] if each else [] for each in lists] for members in kinds.values()]
