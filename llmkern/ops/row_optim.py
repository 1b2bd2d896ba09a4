"""``llmkern::row_lookup``, ``row_catch_up`` and ``row_step``: tables whose rows are stepped when a batch looks them up.

``csrc/core/row_optim.cpp`` says why that is exact. A :class:`RowTable` keeps the step log for every
:class:`RowParameter` that an optimizer has stepped.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .._facts import ROW_RECORD
from .._groups import LazyTable
from ._library import define, define_step
from .embedding import embedding

_lookup = define(
    "row_lookup(LazyTable, Tensor indices) -> Tensor",
    lambda table, indices: table.param.new_empty((indices.shape[0], table.param.shape[1])),
)
_catch_up = define("row_catch_up(LazyTable!, Tensor? indices) -> ()", lambda *args: None)
_step = define_step(
    "row_step(LazyTable!, Tensor indices, Tensor values, float[] step, float grad_scale) -> bool", lambda *args: True
)

# Logged steps before the whole table is brought up to date.
CAPACITY = 4096


class RowRule(NamedTuple):
    """What must not change while rows are behind; :class:`LazyTable` says what each is."""

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
    """A lazily updated table (V, D) with its states, the step log, and how many steps of it each row has had.

    Callers hold ``ROW_LOCK``. The tensors are second ones on the memory of a :class:`RowParameter` and of
    :class:`RowState`, and the only others on it as long as rows are behind.
    """

    def __init__(self, param: Tensor, states: list[Tensor], rule: RowRule, backend: str) -> None:
        self.param, self.states, self.rule, self.backend = param, states, rule, backend
        self.applied = torch.zeros(param.shape[0], dtype=torch.int32, device=param.device)
        self.log = torch.empty(CAPACITY, ROW_RECORD, dtype=torch.float64, device=param.device)
        self.count = 0
        self.eps: float | None = None

    def has_alias(self) -> bool:
        """Whether somebody may read or write the memory without us: another tensor, an array, another process."""
        return any(map(_has_alias, (self.param, *self.states)))

    def lookup(self, indices: Tensor) -> Tensor:
        """The rows (N, D) at ``indices`` (N) as they are after all logged steps."""
        if self.rule.closed:
            return _lookup(*self._lazy(self.rule), indices, self.backend)
        _catch_up(*self._lazy(self.rule), indices, self.backend)
        return embedding(self.param, indices, -1, False, False, self.backend)

    def catch_up(self) -> None:
        """Makes all logged steps on all rows."""
        self._make_all(self.rule)

    def step(self, indices: Tensor, values: Tensor, step: RowStep, grad_scale: float | Tensor = 1.0) -> bool:
        """One step on the gradient with ``values`` (N, D) at rows ``indices`` (N), which may repeat, and none
        elsewhere. Says whether all rows have had it: where the memory has an alias they are stepped, as the dense
        optimizer does it."""
        aliased = self.has_alias()
        if aliased or self.count == CAPACITY - 1 or self.eps != step.eps:
            self.catch_up()
        self.eps = step.eps
        rule = self.rule._replace(closed=False) if aliased else self.rule
        self.count += _step(*self._lazy(rule), indices, values, list(step), grad_scale, self.backend)
        if aliased:
            self._make_all(rule)
        return aliased

    def close(self) -> None:
        """Ends the lazy updates: all rows are up to date, and the memory is left to others."""
        self.catch_up()
        del self.param, self.states

    def _lazy(self, rule: RowRule) -> LazyTable:
        return LazyTable(self.param, self.states, self.applied, self.log, self.count, *rule)

    def _make_all(self, rule: RowRule) -> None:
        if self.count:
            _catch_up(*self._lazy(rule), None, self.backend)
            self.applied.zero_()
            self.count = 0


def _has_alias(memory: Tensor) -> bool:
    # Whether memory of a GPU is shared cannot be asked.
    return _holders(memory) > _TWO or (memory.device.type == "cpu" and memory.is_shared())


def _holders(memory: Tensor) -> int:
    """How many hold the memory: tensors, and Python's storages, which count once there and each one here."""
    storage = memory.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


def _two() -> int:
    first = torch.empty(1)
    second = first.detach()
    return _holders(second)


# What two tensors count, which is not the same in all versions of torch.
_TWO = _two()


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype begin at one place and have one shape."""
    return Tensor.data_ptr(a) == Tensor.data_ptr(b) and a.shape == b.shape
