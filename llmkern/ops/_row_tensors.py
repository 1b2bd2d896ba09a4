"""Tensors whose memory may be behind: a table with row gradients, and the states of its optimizer.

Everything that reads or writes elements is an op, and an op on one of these comes to ``__torch_dispatch__`` first, from
wherever it was called: Python, autograd, ``torch.func``, TorchScript. There rows that are behind are caught up, and
the op gets a plain tensor on the same memory. What leaves that way is known by the count of those who hold the
memory (:meth:`RowTable.has_alias`). Beside the ops there are the methods that hand out memory itself; they are below.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import dispatch
from .embedding import embedding
from .row_optim import RowTable, same_memory

# Held while memory is read, written or handed out. One for all: ops on two tables need no order.
ROW_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child must not inherit it from a thread that the child has not.
    os.register_at_fork(before=ROW_LOCK.acquire, after_in_parent=ROW_LOCK.release, after_in_child=ROW_LOCK.release)


_DATA: Any = Tensor.data


class RowTensor(Tensor):
    """What :class:`RowParameter` and :class:`RowState` have in common."""

    table: RowTable | None = None
    exposed: Tensor | None = None
    gives_memory = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What rows are behind with changes in every step, and must not be baked in. Asking loads no compiler.
        return (_dispatch_eagerly if "torch._dynamo" in sys.modules else _dispatch)(func, args, kwargs or {})

    def catch_up(self) -> None:
        """Makes all pending steps; for readers that call no op, such as pointers that were kept."""
        with ROW_LOCK:
            if self.table is not None:
                self.table.catch_up()

    def memory(self) -> Tensor:
        """A plain tensor on the memory, all rows of which are up to date."""
        self.catch_up()
        return self.unread()

    @property
    @torch._disable_dynamo
    def plain(self) -> Tensor:
        """A plain tensor on the memory, all rows of which are up to date, with this tensor's gradient."""
        return _ReadFunction.apply(self)

    def expose(self) -> None:
        """For those who from now on may read the memory without an op, as TorchScript's modules do when they are saved:
        an alias that lives as long as this tensor, so that no row stays behind any more."""
        self.exposed = self.memory()

    def unread(self) -> Tensor:
        """A plain tensor on the memory as it is."""
        with torch._C._DisableTorchDispatch():
            return torch.Tensor.detach(self)

    def close(self) -> RowTensor:
        """Ends the lazy updates: the memory may become another."""
        with ROW_LOCK:
            table, self.table = self.table, None
            if table is not None:
                table.close()
        return self

    @property
    def data(self) -> Tensor:
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Any) -> None:
        with ROW_LOCK:
            self.close()
            plain = value.memory() if issubclass(type(value), RowTensor) else value
            _DATA.__set__(self, plain)
            if self.exposed is not None:
                self.expose()

    def untyped_storage(self) -> torch.UntypedStorage:
        with ROW_LOCK:
            self.catch_up()
            return super().untyped_storage()

    def data_ptr(self) -> int:
        self.catch_up()
        return super().data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        return self._plain().numpy(force=force)

    def tolist(self) -> Any:
        return self._plain().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.detach().__reduce_ex__(proto)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return self._plain().__repr__(**options)

    def _plain(self) -> Tensor:
        return self.detach().requires_grad_(self.requires_grad)


class _ReadFunction(Function):
    """The same values. Not a view, whose base the compiler would look at."""

    @staticmethod
    def forward(ctx: Any, tensor: RowTensor) -> Tensor:
        return tensor.memory()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class RowState(RowTensor):
    """A state of the optimizer of a :class:`RowParameter`."""

    @classmethod
    def of(cls, state: Tensor, table: RowTable) -> RowState:
        """``state`` as a state of ``table``."""
        result = Tensor._make_subclass(cls, state)
        assert isinstance(result, RowState)
        result.table = table
        return result


class RowParameter(RowTensor, torch.nn.Parameter):
    """An embedding table (V, D) for lookups with sparse gradients, so that ``llmkern.optim`` may leave rows alone until
    they are next looked up.

    Whoever reads its elements otherwise (``state_dict``, a tied output layer, ``copy``, ``print``) finds them as the
    dense optimizer would have left them: the read brings them up to date first. As long as another tensor or an array
    on its memory lives, no row is left behind. ``replay`` asks for the dense optimizer's bits rather than its numbers
    to rounding.
    """

    replay: bool = False

    @classmethod
    def adopt(cls, param: Tensor, replay: bool = False) -> RowParameter:
        """``param`` itself, from now on a row parameter: optimizers and modules that hold it need not know."""
        if not isinstance(param, RowParameter):
            rows = cls(param.detach(), param.requires_grad)
            vars(rows).update(vars(param))
            for own in ("grad", "_backward_hooks", "_post_accumulate_grad_hooks"):
                setattr(rows, own, getattr(param, own))
            torch.utils.swap_tensors(param, rows)
        assert isinstance(param, RowParameter)
        param.replay = replay
        return param

    def __deepcopy__(self, memo: dict[int, Any]) -> RowParameter:
        if id(self) not in memo:
            memo[id(self)] = _rebuild(self.detach().clone(), self.requires_grad, {"replay": self.replay})
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        attributes = {key: value for key, value in vars(self).items() if key not in ("table", "exposed")}
        return _rebuild, (self.detach(), self.requires_grad, attributes)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return "Parameter containing:\n" + super().__repr__(**options)


def _rebuild(data: Tensor, requires_grad: bool, attributes: dict[str, Any]) -> RowParameter:
    # By name, as pickle finds it: llmkern may have been imported again, and torch keeps what the first copy registered.
    param: RowParameter = importlib.import_module(__name__).RowParameter(data, requires_grad)
    vars(param).update(attributes)
    return param


# So that torch.load(weights_only=True) reads what torch.save made of one.
torch.serialization.add_safe_globals([_rebuild])


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with ROW_LOCK:
        if func is torch.ops.aten.embedding.default and (rows := _rows_at(*args)) is not None:
            return rows
        if torch.Tag.inplace_view in func.tags:
            _replace((args, kwargs), RowTensor.close)
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        given: list[tuple[Tensor, RowTensor]] = []

        def memory(t: RowTensor) -> Tensor:
            given.append((t.memory(), t))
            return given[-1][0]

        out = func(*_replace(args, memory), **_replace(kwargs, memory))
    # In place, it is the tensor itself that comes back.
    return next((t for memory, t in given if memory is out), out)


_dispatch_eagerly = torch._disable_dynamo(_dispatch)


def _replace(value: Any, function: Callable[[RowTensor], Any]) -> Any:
    """``value``, arguments of an op, with ``function`` of each row tensor in the place of it."""
    if issubclass(type(value), RowTensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_replace(each, function) for each in value])
    if isinstance(value, dict):
        return {key: _replace(each, function) for key, each in value.items()}
    return value


def _rows_at(weight: Any, indices: Tensor, *_: Any) -> Tensor | None:
    """The lookup of a batch, for which only its rows are brought up to date; ``None`` where it is another's to make."""
    plain = issubclass(type(weight), RowParameter) and type(indices) is Tensor and weight.dim() == 2
    if not plain or torch._C._len_torch_dispatch_stack() or weight.device.type == "meta":
        return None
    if indices.dtype not in (torch.int64, torch.int32) or indices.device != weight.device:
        return None
    backend = dispatch.pick("row_optim", weight)
    flat, table = indices.reshape(-1).contiguous(), weight.table
    if table is not None and table.count and same_memory(weight, table.param):
        out = table.lookup(flat)
    else:
        out = embedding(weight.unread().contiguous(), flat, -1, False, False, backend)
    return out.view(*indices.shape, weight.shape[1])
