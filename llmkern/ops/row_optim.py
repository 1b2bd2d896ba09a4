"""``llmkern::row_lookup``, ``row_catch_up`` and ``row_step``: tables whose rows are stepped when a batch looks them up.

``csrc/core/row_optim.cpp`` says why that is exact. Here is who keeps the books: a :class:`RowTable` for every
:class:`RowParameter` that an optimizer has stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch
from .._torch import F
from ._library import define, define_scaled
from .embedding import embedding

_TABLE = "int count, str kind, bool decoupled, bool maximize, bool nesterov, bool closed"
_lookup = define(
    f"row_lookup(Tensor param, Tensor[] states, Tensor applied, Tensor history, {_TABLE}, Tensor indices, str backend)"
    " -> Tensor",
    lambda param, *args: param.new_empty((args[-1].shape[0], param.shape[1])),
)
_catch_up = define(
    "row_catch_up(Tensor(a!) param, Tensor(b!)[] states, Tensor(c!) applied, Tensor history,"
    f" {_TABLE}, Tensor? indices, str backend) -> ()",
    lambda *args: None,
)
_step = define_scaled(
    "row_step(Tensor(a!) param, Tensor(b!)[] states, Tensor(c!) applied, Tensor(d!) history,"
    f" {_TABLE}, Tensor indices, Tensor values, float[] step, float grad_scale, str backend) -> bool",
    lambda *args: True,
)

# Steps on record before the whole table is brought up to date, and numbers of a record (core/row_optim.h).
CAPACITY, _RECORD = 4096, 31


class RowRule(NamedTuple):
    """An optimizer, ``"adam"``, ``"sgd"`` or ``"adagrad"``, and what must not change while steps are pending. With
    ``closed``, many steps without a gradient are computed at once, to the rounding of fp32."""

    kind: str
    decoupled: bool
    maximize: bool
    nesterov: bool
    closed: bool


class RowStep(NamedTuple):
    """One step. ``first`` and ``second``: Adam's betas, SGD's momentum and dampening, Adagrad's ``lr_decay``."""

    step: float
    lr: float
    first: float
    second: float
    eps: float
    weight_decay: float


class RowTable:
    """A table (V, D) and its states, the steps on record, and how many of them each row has had."""

    def __init__(self, param: Tensor, states: list[Tensor], rule: RowRule, backend: str) -> None:
        self.param, self.states, self.rule, self.backend = param, states, rule, backend
        self.applied = torch.zeros(param.shape[0], dtype=torch.int32, device=param.device)
        self.history = torch.empty(CAPACITY, _RECORD, dtype=torch.float64, device=param.device)
        self.count = 0
        self.eps: float | None = None

    def serves(self, param: Tensor, states: list[Tensor], rule: RowRule, backend: str) -> bool:
        """Whether this is still the table of these tensors."""
        same = len(states) == len(self.states) and all(a is b for a, b in zip(states, self.states, strict=True))
        same = same and (rule, backend) == (self.rule, self.backend) and param.data_ptr() == self.param.data_ptr()
        return same and (param.shape, param.dtype) == (self.param.shape, self.param.dtype)

    def _books(self) -> tuple[Any, ...]:
        return self.param, self.states, self.applied, self.history, self.count, *self.rule

    def lookup(self, indices: Tensor) -> Tensor:
        """The rows (N, D) at ``indices`` (N) as they are after all steps on record."""
        if self.rule.closed:
            return _lookup(*self._books(), indices, self.backend)
        _catch_up(*self._books(), indices, self.backend)
        return embedding(self.param, indices, -1, False, False, self.backend)

    def catch_up(self) -> None:
        """Makes all steps on record on all rows."""
        if self.count:
            _catch_up(*self._books(), None, self.backend)
            self.applied.zero_()
            self.count = 0

    def step(self, indices: Tensor, values: Tensor, step: RowStep, grad_scale: float | Tensor = 1.0) -> None:
        """One step on the gradient with ``values`` (N, D) at rows ``indices`` (N), which may repeat, and none
        elsewhere."""
        if self.count == CAPACITY - 1 or (self.eps != step.eps and self.count):
            self.catch_up()
        self.eps = step.eps
        self.count += _step(*self._books(), indices, values, list(step), grad_scale, self.backend)


# What is known of a tensor without reading its elements: attributes, and functions.
_ATTRIBUTES = (
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "itemsize",
        "nbytes",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
    ),
    *(
        "is_sparse",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_nested",
        "is_quantized",
        "is_mkldnn",
        "retains_grad",
        "_version",
    ),
    *("_backward_hooks", "_post_accumulate_grad_hooks"),
)
_METHODS = (
    *("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size", "__hash__"),
    *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__len__", "data_ptr", "get_device"),
)
_UNREAD: set[Callable[..., Any]] = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(torch.Tensor, name)),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(f for name in ("grad", "requires_grad") for f in [getattr(torch.Tensor, name).__set__]),
}


class RowParameter(torch.nn.Parameter):
    """An embedding table (V, D) whose lookups have row gradients (sparse COO), so that ``llmkern.optim`` may leave rows
    alone until they are next looked up.

    Whoever reads its elements otherwise (``state_dict``, a tied output layer, ``copy``, ``print``) finds them as the
    dense optimizer would have left them: the read brings them up to date first. ``replay`` asks for the dense
    optimizer's bits rather than its numbers to rounding.
    """

    table: RowTable | None = None
    replay: bool = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return row_embedding(*args, **kwargs)
        if func not in _UNREAD:
            for param in _row_parameters((*args, *kwargs.values())):
                param.catch_up()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def adopt(cls, param: Tensor, replay: bool = False) -> RowParameter:
        """``param`` itself, from now on a row parameter: optimizers and modules that hold it need not know."""
        param.__class__ = cls
        assert isinstance(param, RowParameter)
        param.replay = replay
        return param

    def catch_up(self) -> None:
        """Makes all pending steps; for readers that PyTorch does not see, such as pointers from ``data_ptr``."""
        if self.table is not None:
            self.table.catch_up()

    def __reduce_ex__(self, proto: Any) -> Any:
        return _rebuild, (self.data, self.requires_grad, self.replay)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowParameter:
        if id(self) not in memo:
            memo[id(self)] = _rebuild(self.data.clone(), self.requires_grad, self.replay)
        return memo[id(self)]


def _rebuild(data: Tensor, requires_grad: bool, replay: bool) -> RowParameter:
    return RowParameter.adopt(torch.nn.Parameter(data, requires_grad), replay)


def _row_parameters(values: Iterable[Any]) -> Iterable[RowParameter]:
    for value in values:
        if isinstance(value, RowParameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _row_parameters(value)


class RowEmbeddingFunction(torch.autograd.Function):
    """out[n] = weight[indices[n]], with a gradient of the rows that occur: uncoalesced, no pass over it."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, indices: Tensor, padding_idx: int, rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.padding_idx = weight.shape, padding_idx
        return rows(indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        values = dout.contiguous()
        if ctx.padding_idx >= 0 and bool((indices == ctx.padding_idx).any()):
            kept = (indices != ctx.padding_idx).nonzero().squeeze(1)
            indices, values = indices[kept], values[kept]
        # Indices were checked by the forward.
        grad = torch.sparse_coo_tensor(indices.long()[None], values, ctx.shape, check_invariants=False)
        return grad, None, None, None


# What is pending changes with every step, which compiled code must not bake in. torch.compiler.disable would load the
# compiler now.
@torch._disable_dynamo
def row_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.embedding` of a :class:`RowParameter`. With ``max_norm``, which reads and writes the
    table before each lookup, with ``scale_grad_by_freq`` and in transforms it is torch's own, with a dense gradient."""
    options = {"max_norm": max_norm is not None, "scale_grad_by_freq": scale_grad_by_freq}
    served = weight.dim() == 2 and input.dtype in (torch.int64, torch.int32) and input.device == weight.device
    served = served and not any(options.values()) and not torch._C._are_functorch_transforms_active()
    served = served and (padding_idx is None or -weight.shape[0] <= padding_idx < weight.shape[0])
    if not served or not isinstance(weight, RowParameter):
        with torch._C.DisableTorchFunctionSubclass():
            for param in _row_parameters((weight,)):
                param.catch_up()
            return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    backend = dispatch.pick("row_optim", weight, options=["row_grad"])
    padding = -1 if padding_idx is None else padding_idx % max(1, weight.shape[0])
    indices = input.reshape(-1).contiguous()
    with torch._C.DisableTorchFunctionSubclass():
        values = weight.detach().contiguous()
        pending = weight.table if weight.table is not None and weight.table.count else None

        def rows(indices: Tensor) -> Tensor:
            return embedding(values, indices, -1, False, False, backend) if pending is None else pending.lookup(indices)

        if torch.is_grad_enabled() and weight.requires_grad:
            out = RowEmbeddingFunction.apply(weight, indices, padding, rows)
        else:
            out = rows(indices)
        return out.view(*input.shape, weight.shape[1])
