"""``llmkern::row_lookup``, ``row_catch_up`` and ``row_step``: tables whose rows are stepped when a batch looks them up.

``csrc/core/row_optim.cpp`` says why that is exact. Here is who keeps the books: a :class:`RowTable` for every
:class:`RowParameter` that an optimizer has stepped.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._facts import ROW_RECORD
from ._library import define, define_scaled
from .embedding import embedding

_TABLE = "int count, str kind, bool decoupled, bool maximize, bool nesterov, bool closed"
_lookup = define(
    f"row_lookup(Tensor param, Tensor[] states, Tensor applied, Tensor history, {_TABLE}, Tensor indices) -> Tensor",
    lambda param, *args: param.new_empty((args[-1].shape[0], param.shape[1])),
)
_catch_up = define(
    "row_catch_up(Tensor(a!) param, Tensor(b!)[] states, Tensor(c!) applied, Tensor history,"
    f" {_TABLE}, Tensor? indices) -> ()",
    lambda *args: None,
)
_step = define_scaled(
    "row_step(Tensor(a!) param, Tensor(b!)[] states, Tensor(c!) applied, Tensor(d!) history,"
    f" {_TABLE}, Tensor indices, Tensor values, float[] step, float grad_scale) -> bool",
    lambda *args: True,
)

# Steps on record before the whole table is brought up to date.
CAPACITY = 4096


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
    """A table (V, D) and its states, the steps on record, and how many of them each row has had.

    Callers hold ``ROW_LOCK``. The tensors are second ones on the memory of a :class:`RowParameter` and of
    :class:`RowState`, and the only others on it as long as rows wait.
    """

    def __init__(self, param: Tensor, states: list[Tensor], rule: RowRule, backend: str) -> None:
        self.param, self.states, self.rule, self.backend = param, states, rule, backend
        self.applied = torch.zeros(param.shape[0], dtype=torch.int32, device=param.device)
        self.history = torch.empty(CAPACITY, ROW_RECORD, dtype=torch.float64, device=param.device)
        self.count = 0
        self.eps: float | None = None

    def is_seen(self) -> bool:
        """Whether somebody may read or write the memory without us: another tensor, an array, another process."""
        return any(map(_is_seen, (self.param, *self.states)))

    def lookup(self, indices: Tensor) -> Tensor:
        """The rows (N, D) at ``indices`` (N) as they are after all steps on record."""
        if self.rule.closed:
            return _lookup(*self._books(self.rule), indices, self.backend)
        _catch_up(*self._books(self.rule), indices, self.backend)
        return embedding(self.param, indices, -1, False, False, self.backend)

    def catch_up(self) -> None:
        """Makes all steps on record on all rows."""
        self._make_all(self.rule)

    def step(self, indices: Tensor, values: Tensor, step: RowStep, grad_scale: float | Tensor = 1.0) -> bool:
        """One step on the gradient with ``values`` (N, D) at rows ``indices`` (N), which may repeat, and none
        elsewhere. Says whether no row waits for it: where the memory is seen all rows are stepped, as the dense
        optimizer does it."""
        seen = self.is_seen()
        if seen or self.count == CAPACITY - 1 or self.eps != step.eps:
            self.catch_up()
        self.eps = step.eps
        rule = self.rule._replace(closed=False) if seen else self.rule
        self.count += _step(*self._books(rule), indices, values, list(step), grad_scale, self.backend)
        if seen:
            self._make_all(rule)
        return seen

    def close(self) -> None:
        """Ends the books: all rows are up to date, and the memory is left to others."""
        self.catch_up()
        del self.param, self.states

    def _books(self, rule: RowRule) -> tuple[Any, ...]:
        return self.param, self.states, self.applied, self.history, self.count, *rule

    def _make_all(self, rule: RowRule) -> None:
        if self.count:
            _catch_up(*self._books(rule), None, self.backend)
            self.applied.zero_()
            self.count = 0


def _is_seen(memory: Tensor) -> bool:
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
