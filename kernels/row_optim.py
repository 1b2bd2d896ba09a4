"""Exact optimizers at the cost of a batch: a row waits for its steps until a batch looks it up.

``csrc/core/row_optim.cpp`` says why that is exact and where the closed form is good; ``_row_records`` keeps the record.
A program takes a row, or a run of equal rows of the batch, and 512 columns at most. A row that waits is brought up to
date in registers: in closed form at once, else step by step, by the rules and to the bits of the dense optimizer. In
closed form an element goes step by step if its own root is too small; which others are in its block does not matter.

Each program decides what to do by how many steps its row has had (``applied``), so that is counted by a launch of its
own when all are done. An index out of range sorts last; then nothing is written, and the step on record was not made.

Traffic of a training step with R rows of D in fp32: a lookup reads p, m, v of a row (nothing but p if it is up to date)
and writes N D; the step reads N D of gradients and reads and writes p, m, v. Nothing depends on V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import LazyTable
from . import _faults, _tuples
from . import _optim_rules as rules
from . import _row_records as records
from ._launch import acc_type, accumulator, ceil_div, launch, triton_type
from ._row_order import CHUNK, RunBlocks, block_d, order_distinct, runs_of
from ._table_gradient import gradient_blocks
from .sparse_optim import ROWS, gradient_of_run, row_of_run


class LazyRows(NamedTuple):
    """A table whose rows may be behind, as kernels take it."""

    param: Tensor
    states: tuple[Tensor, ...]
    applied: Tensor
    log: Tensor


class Batch(NamedTuple):
    """The rows of a batch, of each run one; None: the whole table."""

    rows: Tensor | None
    group: Tensor | None


class LazyShape(NamedTuple):
    """What kernels are compiled for."""

    RULE: str
    CLOSED: bool
    ACC: tl.dtype
    PARAM: tl.dtype
    STATE: tl.dtype
    BLOCK_D: int


@triton.jit
def _rounded(states, S):
    """As memory would keep them."""
    rounded = ()
    for k in tl.static_range(len(states)):
        rounded += (states[k].to(S.STATE).to(S.ACC),)
    return rounded


@triton.jit
def _replayed(p, states, active, log_ptr, applied, count, S):
    """After steps ``[applied, count)``, each rounded as memory would keep it; of the ``active`` elements, or all."""
    none = tl.zeros_like(p)
    for u in range(applied, count):
        record_ptr = log_ptr + u * records.SIZE
        if tl.load(record_ptr) > 0:
            numbers = records.rule_numbers(record_ptr, S.ACC)
            new, new_states = rules.update(p, none, states, numbers, S.RULE)
            new, new_states = new.to(S.PARAM).to(S.ACC), _rounded(new_states, S)
            if active is not None:
                new, new_states = tl.where(active, new, p), _tuples.where(active, new_states, states)
            p, states = new, new_states
    return p, states


@triton.jit
def _closed(p, states, record_ptr, RULE: tl.constexpr):
    """After all pending steps at once, and where that is not accurate enough."""
    ACC: tl.constexpr = p.dtype
    keep0 = tl.load(record_ptr + records.KEEP_AT).to(ACC)
    keep1 = tl.load(record_ptr + records.KEEP_AT + 1).to(ACC)
    keep2 = tl.load(record_ptr + records.KEEP_AT + 2).to(ACC)
    slow = tl.zeros_like(p) != 0
    if RULE == "sgd":
        p = p * keep0
    elif RULE == "momentum":
        keep3 = tl.load(record_ptr + records.KEEP_AT + 3).to(ACC)
        before, buffer = p, states[0]
        p = tl.fma(p, keep0 + tl.zeros_like(p), keep1 * buffer)
        states = (tl.fma(before, keep2 + tl.zeros_like(p), keep3 * buffer),)
    else:
        m, v = states[0], states[1]
        weight0 = tl.load(record_ptr + records.WEIGHT_AT).to(ACC)
        weight1 = tl.load(record_ptr + records.WEIGHT_AT + 1).to(ACC)
        eps0 = tl.load(record_ptr + records.EPS_AT).to(ACC)
        eps1 = tl.load(record_ptr + records.EPS_AT + 1).to(ACC)
        least = tl.load(record_ptr + records.LEAST_AT).to(ACC)
        root = rules.root(states[2] if RULE == "amsgrad" else v)
        slow = (root < least) & (m != 0)
        # Both nodes over their common denominator: one division.
        near, far = root + eps0, root + eps1
        change = rules.divide(m * (weight0 * far + weight1 * near), near * far)
        # Without a past, nothing; 0 / 0 where eps is 0, as in the dense step.
        p = tl.fma(p, keep0 + tl.zeros_like(p), -change)
        new = (m * keep1, v * keep2)
        if RULE == "amsgrad":
            new += (states[2],)
        states = new
    return p, states, slow


@triton.jit
def _up_to_date(p, states, mask, log_ptr, applied, count, S):
    if S.CLOSED:
        if applied < count:
            new, new_states, slow = _closed(p, states, log_ptr + applied * records.SIZE, S.RULE)
            slow = slow & mask
            p, states = tl.where(slow, p, new), _tuples.where(slow, states, new_states)
            if tl.max(slow.to(tl.int32), 0) > 0:
                p, states = _replayed(p, states, slow, log_ptr, applied, count, S)
    else:
        p, states = _replayed(p, states, None, log_ptr, applied, count, S)
    return p, states


@triton.jit(do_not_specialize=["count"])
def row_lookup_kernel(table, indices_ptr, out_ptr, fault_ptr, V, D, count, S):
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(indices_ptr + n).to(tl.int64)
    good = (row >= 0) & (row < V)
    _faults.report(~good, row, fault_ptr)
    if good:
        columns = tl.program_id(1) * S.BLOCK_D + tl.arange(0, S.BLOCK_D)
        mask = columns < D
        i = row * D + columns
        p = tl.load(table.param + i, mask=mask).to(S.ACC)
        applied = tl.load(table.applied + row)
        if applied < count:
            states = _tuples.load(table.states, i, mask, S.ACC)
            p, states = _up_to_date(p, states, mask, table.log, applied, count, S)
        tl.store(out_ptr + n * D + columns, p.to(S.PARAM), mask=mask)


@triton.jit(do_not_specialize=["N", "count"])
def row_catch_up_kernel(table, batch, N, V, D, count, S):
    """Of each run of a batch, or without its ``rows`` of the whole table."""
    row = tl.program_id(0).to(tl.int64)
    good = row < V
    if batch.rows is not None:
        row, good = row_of_run(batch, row, N, V)
    if good:
        applied = tl.load(table.applied + row)
        if applied < count:
            columns = tl.program_id(1) * S.BLOCK_D + tl.arange(0, S.BLOCK_D)
            mask = columns < D
            i = row * D + columns
            p, states = tl.load(table.param + i, mask=mask).to(S.ACC), _tuples.load(table.states, i, mask, S.ACC)
            p, states = _up_to_date(p, states, mask, table.log, applied, count, S)
            _tuples.store(table.states, i, states, mask)
            tl.store(table.param + i, p.to(S.PARAM), mask=mask)


@triton.jit(do_not_specialize=["N", "count"])
def row_step_kernel(
    table, runs, factor_ptr, N, V, D, count,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64, S, R,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    row, good = row_of_run(runs, run, N, V)
    if good:
        columns = tl.program_id(1) * R.BLOCK_D + tl.arange(0, R.BLOCK_D)
        mask = columns < D
        i = row * D + columns
        g = gradient_of_run(runs, run, columns, D, R)
        p, states = tl.load(table.param + i, mask=mask).to(S.ACC), _tuples.load(table.states, i, mask, S.ACC)
        p, states = _up_to_date(p, states, mask, table.log, tl.load(table.applied + row), count, S)
        numbers = rules.numbers_in(factor_ptr, (n0, n1, n2, n3, n4, n5, n6, n7, n8), S.ACC)
        # The dense gradient has the parameter's dtype.
        p, states = rules.update(p, g.to(S.PARAM).to(S.ACC), states, numbers, S.RULE)
        _tuples.store(table.states, i, states, mask)
        tl.store(table.param + i, p.to(S.PARAM), mask=mask)


@triton.jit(do_not_specialize=["N", "count"])
def row_applied_kernel(applied_ptr, batch, N, V, count, BLOCK: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(batch.rows + tl.load(batch.group + N - 1))
    row = tl.load(batch.rows + run, mask=run < N, other=V).to(tl.int64)
    row = tl.where(last < V, row, V)
    tl.store(applied_ptr + row, count + tl.zeros_like(row).to(tl.int32), mask=row < V)


# Its numbers are arguments each, because Triton passes the floats of a group in fp32.
@triton.jit(do_not_specialize=["N", "count"])
def row_record_kernel(
    log_ptr, batch, N, V, count,
    step: tl.float64, lr: tl.float64, first: tl.float64, second: tl.float64, eps: tl.float64, decay: tl.float64,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64,
    e0: tl.float64, e1: tl.float64, e2: tl.float64, e3: tl.float64,
    RULE: tl.constexpr, CLOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logs a step as number ``count``, and adds it to the closed forms of those before it. A step with an index out of
    range was not made: its number is 0, and it leaves everything as it is."""
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if not CLOSED:
        u += count
    new, record, made = u == count, log_ptr + u * records.SIZE, u >= 0
    if batch.rows is not None:
        made = tl.load(batch.rows + tl.load(batch.group + N - 1)) + tl.zeros_like(u) < V
    zero = tl.zeros((BLOCK,), tl.float64)
    tl.store(record, tl.where(made, step + zero, 0.0), mask=new)
    numbers = (lr, first, second, eps, decay, n0, n1, n2, n3, n4, n5, n6, n7, n8)
    for k in tl.static_range(14):
        tl.store(record + 1 + k, numbers[k] + zero, mask=new)
    if CLOSED:
        mask = (u <= count) & (made | new)
        e0, e1 = tl.where(made, e0 + zero, 1.0), tl.where(made, e1 + zero, 0.0)
        e2, e3 = tl.where(made, e2 + zero, 0.0), tl.where(made, e3 + zero, 1.0)
        if RULE == "sgd" or RULE == "momentum":
            records.extend_sgd(record, new, mask, e0, e1, e2, e3)
        else:
            beta1, beta2 = tl.where(made, first + zero, 1.0), tl.where(made, second + zero, 1.0)
            records.extend_adam(record, new, mask, beta1, beta2, eps + zero, e0, e3, e2, RULE == "amsgrad")


class _Table(LazyTable):
    """What kernels are given of a table."""

    def check(self) -> None:
        """That memory is not touched outside tensors, and that the closed form is one that exists."""
        if self.kind not in ("adam", "sgd", "adagrad"):
            raise ValueError(f"row_optim: expected adam, sgd or adagrad, got {self.kind}")
        p, types = self.param, {state.dtype for state in self.states}
        few = {"adam": (2, 3), "sgd": (0, 1), "adagrad": (1, 1)}[self.kind]
        good = p.dim() == 2 and few[0] <= len(self.states) <= few[1] and len(types) < 2
        good = good and types <= {p.dtype, accumulator(p)} and all(s.numel() == p.numel() for s in self.states)
        if not good or not all(t.is_contiguous() for t in (p, self.applied, self.log, *self.states)):
            raise ValueError(
                "row_optim: expected a table (V, D) and the states of its optimizer, contiguous, of its shape, and of"
                " its dtype or float32 (float64 for float64)"
            )
        size = self.log.shape == (max(self.log.shape[0], self.logged + 1), records.SIZE.value)
        if self.applied.dtype != torch.int32 or self.applied.numel() != p.shape[0] or not size:
            raise ValueError("row_optim: expected applied int32 (V), and log float64 (more than count, 31)")
        fp32 = all(t.dtype == torch.float32 for t in (p, *self.states))
        if self.closed and (not fp32 or self.kind == "adagrad"):
            raise ValueError("closed: expected float32 and no adagrad")

    @property
    def rule(self) -> str:
        if self.kind == "adam":
            return "amsgrad" if len(self.states) == 3 else "adam"
        return "momentum" if self.kind == "sgd" and self.states else self.kind

    def rows(self) -> LazyRows:
        return LazyRows(self.param, tuple(self.states), self.applied, self.log)

    def shape(self) -> LazyShape:
        param, state = self.param, (self.states or [self.param])[0]
        types = acc_type(param), triton_type(param), triton_type(state)
        return LazyShape(self.rule, self.closed, *types, block_d(param.shape[1]))

    def numbers(self, step: list[float], grad_scale: float) -> tuple[float, ...]:
        t, lr, first, second, eps, decay = step
        if self.kind == "adam":
            return rules.adam(t, lr, first, second, eps, decay, self.decoupled, self.maximize, grad_scale)
        if self.kind == "sgd":
            return rules.sgd(t, lr, first, second, decay, self.nesterov, self.maximize, grad_scale)
        return rules.adagrad(t, lr, first, decay, eps, self.maximize, grad_scale)

    def extension(self, step: list[float]) -> tuple[float, float, float, float]:
        """What a step does to the closed forms. Adam: of p what is kept, nothing, lr / (1 - beta1^t), 1 - beta2^t.
        Sgd: the 2 x 2 product."""
        t, lr, first, second, _, decay = step
        if self.kind == "adam":
            return 1 - lr * decay if self.decoupled else 1.0, 0.0, lr / (1 - first**t), 1 - second**t
        if self.kind == "adagrad" or not self.states:
            return 1 - lr * decay, 0.0, 0.0, 1.0
        # p, b -> (1 - lr along_p) p - lr along_b b, b_of_p p + b_of_b b.
        b_of_b, b_of_p = (0.0, decay) if t == 1 else (first, (1 - second) * decay)
        along_p, along_b = (decay + first * b_of_p, first * b_of_b) if self.nesterov else (b_of_p, b_of_b)
        return 1 - lr * along_p, -lr * along_b, b_of_p, b_of_b

    def grid(self, rows: int) -> tuple[int, int]:
        D = self.param.shape[1]
        return rows, ceil_div(D, block_d(D))

    def mark(self, batch: Batch, N: int, count: int) -> None:
        """The rows of a batch of N, which is not empty, have had ``count`` steps."""
        launch(row_applied_kernel, (ceil_div(N, 256),), self.applied, batch, N, self.param.shape[0], count, BLOCK=256)


def _warps(D: int) -> int:
    """Where no run is added up: four elements a thread."""
    return max(1, block_d(D) // 128)


def _gradient_blocks(table: _Table) -> tuple[int, int]:
    """Rows and columns of the block that runs are added up in. It decides the order of a sum: where steps are replayed,
    it is the dense gradient's."""
    return (ROWS, block_d(table.param.shape[1])) if table.closed else gradient_blocks(table.param)


def _checked_indices(indices: Tensor) -> Tensor:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64) or not indices.is_contiguous():
        raise ValueError("indices: expected contiguous int32 or int64 (N)")
    return indices


def row_lookup(lazy: LazyTable, indices: Tensor) -> Tensor:
    """Rows (N, D) at ``indices`` (N) as they are after all logged steps; nothing else is written."""
    table, param, count = _Table(*lazy), lazy.param, lazy.logged
    table.check()
    N, (V, D) = _checked_indices(indices).shape[0], param.shape
    out = param.new_empty((N, D))
    arguments = table.rows(), indices, out, _faults.word(_faults.EMBEDDING), V, D, count
    launch(row_lookup_kernel, table.grid(N), *arguments, S=table.shape(), num_warps=_warps(D), fp_fusion=False)
    return out


def row_catch_up(lazy: LazyTable, indices: Tensor | None) -> None:
    """Makes the logged steps that rows ``indices`` (``None``: all rows) have not had."""
    table, param, count = _Table(*lazy), lazy.param, lazy.logged
    table.check()
    V, D = param.shape
    options: dict[str, Any] = {"S": table.shape(), "num_warps": _warps(D), "fp_fusion": False}
    if indices is None:
        launch(row_catch_up_kernel, table.grid(V), table.rows(), Batch(None, None), 0, V, D, count, **options)
        lazy.applied.fill_(count)
        return
    N = _checked_indices(indices).shape[0]
    if N == 0:
        return
    order = order_distinct(indices, V)
    batch = Batch(order.rows, order.group)
    launch(row_catch_up_kernel, table.grid(N), table.rows(), batch, N, V, D, count, **options)
    table.mark(batch, N, count)


def row_step(lazy: LazyTable, indices: Tensor, values: Tensor, step: list[float], grad_scale: float | Tensor) -> bool:
    """One step on a gradient that is ``grad_scale`` times the sum of ``values`` (N, D) by ``indices`` (N). Says whether
    the step changes rows that have no gradient; it is then logged, as ``log[logged]``."""
    table, param, count = _Table(*lazy), lazy.param, lazy.logged
    table.check()
    N, (V, D) = _checked_indices(indices).shape[0], param.shape
    if values.shape != (N, D) or values.dtype != param.dtype or not values.is_contiguous() or len(step) != 6:
        raise ValueError(
            "row_step: expected contiguous values (N, D) of the parameter's dtype, and a step's six numbers"
        )
    is_logged = lazy.kind == "adam" or step[5] != 0 or (lazy.kind == "sgd" and step[2] != 0)
    batch = Batch(None, None)
    if N:
        factor, scale = rules.factored(grad_scale)
        rows, block = _gradient_blocks(table)
        runs, S = runs_of(values, order_distinct(indices, V)), table.shape()
        batch = Batch(runs.rows, runs.group)
        grid, R = (N, ceil_div(D, block)), RunBlocks(S.ACC, CHUNK, rows, block)
        arguments = table.rows(), runs, factor, N, V, D, count, *table.numbers(step, scale)
        launch(row_step_kernel, grid, *arguments, S=S, R=R, fp_fusion=False)
        table.mark(batch, N, count + is_logged)
    if is_logged:
        # In closed form every record grows by the step.
        grid = (ceil_div(count + 1, 128) if lazy.closed else 1,)
        numbers = *step, *table.numbers(step, 1.0), *table.extension(step)
        constants: dict[str, Any] = {"RULE": table.rule, "CLOSED": lazy.closed, "BLOCK": 128}
        launch(row_record_kernel, grid, lazy.log, batch, N, V, count, *numbers, **constants)
    return is_logged
