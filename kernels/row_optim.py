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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import LazyTable
from . import _faults
from . import _optim_rules as rules
from . import _row_records as records
from ._launch import acc_type, accumulator, ceil_div, launch, triton_type
from ._row_order import CHUNK, block_d, chunk_sums, order_distinct
from ._table_gradient import gradient_tile
from .sparse_optim import ROWS, gradient_of_run, row_of_run


@triton.jit
def _replayed(
    p, s0, s1, s2, active, history_ptr, applied, count, RULE: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr
):  # fmt: skip
    """After steps ``[applied, count)``, each rounded as memory would keep it; of the ``active`` elements, or all."""
    none = tl.zeros_like(p)
    for u in range(applied, count):
        record_ptr = history_ptr + u * records.SIZE
        if tl.load(record_ptr) > 0:
            numbers = records.rule_numbers(record_ptr, p.dtype)
            q, t0, t1, t2 = rules.update(p, none, s0, s1, s2, numbers, RULE)
            q, t0 = q.to(PARAM).to(none.dtype), t0.to(STATE).to(none.dtype)
            t1, t2 = t1.to(STATE).to(none.dtype), t2.to(STATE).to(none.dtype)
            if active is not None:
                q, t0 = tl.where(active, q, p), tl.where(active, t0, s0)
                t1, t2 = tl.where(active, t1, s1), tl.where(active, t2, s2)
            p, s0, s1, s2 = q, t0, t1, t2
    return p, s0, s1, s2


@triton.jit
def _closed(p, s0, s1, s2, record_ptr, RULE: tl.constexpr):
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
        before = p
        p = tl.fma(p, keep0 + tl.zeros_like(p), keep1 * s0)
        s0 = tl.fma(before, keep2 + tl.zeros_like(p), keep3 * s0)
    else:
        weight0 = tl.load(record_ptr + records.WEIGHT_AT).to(ACC)
        weight1 = tl.load(record_ptr + records.WEIGHT_AT + 1).to(ACC)
        eps0 = tl.load(record_ptr + records.EPS_AT).to(ACC)
        eps1 = tl.load(record_ptr + records.EPS_AT + 1).to(ACC)
        least = tl.load(record_ptr + records.LEAST_AT).to(ACC)
        root = rules.root(s2 if RULE == "amsgrad" else s1)
        slow = (root < least) & (s0 != 0)
        # Both nodes over their common denominator: one division.
        near, far = root + eps0, root + eps1
        change = rules.divide(s0 * (weight0 * far + weight1 * near), near * far)
        # Without a past, nothing; 0 / 0 where eps is 0, as in the dense step.
        p = tl.fma(p, keep0 + tl.zeros_like(p), -change)
        s0, s1 = s0 * keep1, s1 * keep2
    return p, s0, s1, s2, slow


@triton.jit
def _up_to_date(
    p, s0, s1, s2, mask, history_ptr, applied, count,
    RULE: tl.constexpr, CLOSED: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    if CLOSED:
        if applied < count:
            q, t0, t1, t2, slow = _closed(p, s0, s1, s2, history_ptr + applied * records.SIZE, RULE)
            slow = slow & mask
            p, s0 = tl.where(slow, p, q), tl.where(slow, s0, t0)
            s1, s2 = tl.where(slow, s1, t1), tl.where(slow, s2, t2)
            if tl.max(slow.to(tl.int32), 0) > 0:
                p, s0, s1, s2 = _replayed(p, s0, s1, s2, slow, history_ptr, applied, count, RULE, PARAM, STATE)
    else:
        p, s0, s1, s2 = _replayed(p, s0, s1, s2, None, history_ptr, applied, count, RULE, PARAM, STATE)
    return p, s0, s1, s2


@triton.jit(do_not_specialize=["count"])
def row_lookup_kernel(
    param_ptr, s0_ptr, s1_ptr, s2_ptr, applied_ptr, history_ptr, indices_ptr, out_ptr, fault_ptr, V, D, count,
    RULE: tl.constexpr, CLOSED: tl.constexpr, ACC: tl.constexpr, STATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(indices_ptr + n).to(tl.int64)
    good = (row >= 0) & (row < V)
    _faults.report(~good, row, fault_ptr)
    if good:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = columns < D
        i = row * D + columns
        PARAM: tl.constexpr = param_ptr.dtype.element_ty
        p = tl.load(param_ptr + i, mask=mask).to(ACC)
        applied = tl.load(applied_ptr + row)
        if applied < count:
            s0, s1, s2 = rules.load_states(s0_ptr, s1_ptr, s2_ptr, i, mask, p)
            p, s0, s1, s2 = _up_to_date(p, s0, s1, s2, mask, history_ptr, applied, count, RULE, CLOSED, PARAM, STATE)
        tl.store(out_ptr + n * D + columns, p.to(PARAM), mask=mask)


@triton.jit(do_not_specialize=["N", "count"])
def row_catch_up_kernel(
    param_ptr, s0_ptr, s1_ptr, s2_ptr, applied_ptr, history_ptr, rows_ptr, group_ptr, N, V, D, count,
    RULE: tl.constexpr, CLOSED: tl.constexpr, ACC: tl.constexpr, STATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each run, or without ``rows`` of the whole table."""
    row = tl.program_id(0).to(tl.int64)
    good = row < V
    if rows_ptr is not None:
        row, good = row_of_run(rows_ptr, group_ptr, row, N, V)
    if good:
        applied = tl.load(applied_ptr + row)
        if applied < count:
            columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = columns < D
            i = row * D + columns
            PARAM: tl.constexpr = param_ptr.dtype.element_ty
            p = tl.load(param_ptr + i, mask=mask).to(ACC)
            s0, s1, s2 = rules.load_states(s0_ptr, s1_ptr, s2_ptr, i, mask, p)
            p, s0, s1, s2 = _up_to_date(p, s0, s1, s2, mask, history_ptr, applied, count, RULE, CLOSED, PARAM, STATE)
            rules.store_states(s0_ptr, s1_ptr, s2_ptr, i, mask, s0, s1, s2)
            tl.store(param_ptr + i, p.to(PARAM), mask=mask)


@triton.jit(do_not_specialize=["N", "count"])
def row_step_kernel(
    param_ptr, s0_ptr, s1_ptr, s2_ptr, applied_ptr, history_ptr, values_ptr,
    positions_ptr, group_ptr, starts_ptr, rows_ptr, partials_ptr, factor_ptr, N, V, D, count,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64,
    RULE: tl.constexpr, CLOSED: tl.constexpr, ACC: tl.constexpr, STATE: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    row, good = row_of_run(rows_ptr, group_ptr, run, N, V)
    if good:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = columns < D
        i = row * D + columns
        PARAM: tl.constexpr = param_ptr.dtype.element_ty
        start, end = tl.load(starts_ptr + run), tl.load(starts_ptr + run + 1)
        g = gradient_of_run(values_ptr, positions_ptr, partials_ptr, start, end, columns, D, ACC, CHUNK, ROWS, BLOCK_D)
        p = tl.load(param_ptr + i, mask=mask).to(ACC)
        s0, s1, s2 = rules.load_states(s0_ptr, s1_ptr, s2_ptr, i, mask, p)
        p, s0, s1, s2 = _up_to_date(
            p, s0, s1, s2, mask, history_ptr, tl.load(applied_ptr + row), count, RULE, CLOSED, PARAM, STATE
        )
        numbers = rules.numbers_in(factor_ptr, n0, n1, n2, n3, n4, n5, n6, n7, n8, ACC)
        # The dense gradient has the parameter's dtype.
        p, s0, s1, s2 = rules.update(p, g.to(PARAM).to(ACC), s0, s1, s2, numbers, RULE)
        rules.store_states(s0_ptr, s1_ptr, s2_ptr, i, mask, s0, s1, s2)
        tl.store(param_ptr + i, p.to(PARAM), mask=mask)


@triton.jit(do_not_specialize=["N", "count"])
def row_applied_kernel(applied_ptr, rows_ptr, group_ptr, N, V, count, BLOCK: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(rows_ptr + tl.load(group_ptr + N - 1))
    row = tl.load(rows_ptr + run, mask=run < N, other=V).to(tl.int64)
    row = tl.where(last < V, row, V)
    tl.store(applied_ptr + row, count + tl.zeros_like(row).to(tl.int32), mask=row < V)


@triton.jit(do_not_specialize=["N", "count"])
def row_record_kernel(
    history_ptr, rows_ptr, group_ptr, N, V, count,
    step: tl.float64, lr: tl.float64, first: tl.float64, second: tl.float64, eps: tl.float64, decay: tl.float64,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64,
    n5: tl.float64, n6: tl.float64, n7: tl.float64, n8: tl.float64,
    e0: tl.float64, e1: tl.float64, e2: tl.float64, e3: tl.float64,
    RULE: tl.constexpr, CLOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts a step on record as number ``count``, and on the closed forms of those before it. A step with an index out
    of range was not made: its number is 0, and it leaves everything as it is."""
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if not CLOSED:
        u += count
    new, record, made = u == count, history_ptr + u * records.SIZE, u >= 0
    if rows_ptr is not None:
        made = tl.load(rows_ptr + tl.load(group_ptr + N - 1)) + tl.zeros_like(u) < V
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

    def pointers(self) -> tuple[Any, ...]:
        """What every kernel begins with."""
        return self.param, *self.states, *[None] * (3 - len(self.states)), self.applied, self.log

    def constants(self) -> dict[str, Any]:
        return {
            "RULE": self.rule,
            "CLOSED": self.closed,
            "ACC": acc_type(self.param),
            "STATE": triton_type((self.states or [self.param])[0]),
            "BLOCK_D": block_d(self.param.shape[1]),
            "fp_fusion": False,
        }

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

    def mark(self, rows: Tensor, group: Tensor, count: int) -> None:
        """The rows of a batch that is not empty have had ``count`` steps."""
        N, V = rows.shape[0], self.param.shape[0]
        launch(row_applied_kernel, (ceil_div(N, 256),), self.applied, rows, group, N, V, count, BLOCK=256)


def _warps(D: int) -> int:
    """Where no run is added up: four elements a thread."""
    return max(1, block_d(D) // 128)


def _gradient_tile(table: _Table) -> tuple[int, int]:
    """Rows and columns of the tile that runs are added up in. It decides the order of a sum: where steps are replayed,
    it is the dense gradient's."""
    return (ROWS, block_d(table.param.shape[1])) if table.closed else gradient_tile(table.param)


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
    fault = _faults.word(_faults.EMBEDDING)
    launch(
        row_lookup_kernel, table.grid(N), *table.pointers(), indices, out, fault, V, D, count,
        **table.constants(), num_warps=_warps(D),
    )  # fmt: skip
    return out


def row_catch_up(lazy: LazyTable, indices: Tensor | None) -> None:
    """Makes the logged steps that rows ``indices`` (``None``: all rows) have not had."""
    table, param, count = _Table(*lazy), lazy.param, lazy.logged
    table.check()
    V, D = param.shape
    options = {**table.constants(), "num_warps": _warps(D)}
    if indices is None:
        launch(row_catch_up_kernel, table.grid(V), *table.pointers(), None, None, 0, V, D, count, **options)
        lazy.applied.fill_(count)
        return
    N = _checked_indices(indices).shape[0]
    if N == 0:
        return
    order = order_distinct(indices, V)
    assert order.rows is not None
    launch(row_catch_up_kernel, table.grid(N), *table.pointers(), order.rows, order.group, N, V, D, count, **options)
    table.mark(order.rows, order.group, count)


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
    rows = group = None
    if N:
        factor, scale = rules.factored(grad_scale)
        some, block = _gradient_tile(table)
        order = order_distinct(indices, V)
        rows, group = order.rows, order.group
        assert rows is not None
        launch(
            row_step_kernel, (N, ceil_div(D, block)), *table.pointers(), values, order.positions, group, order.starts,
            rows, chunk_sums(values, order), factor, N, V, D, count, *table.numbers(step, scale),
            **{**table.constants(), "BLOCK_D": block}, CHUNK=CHUNK, ROWS=some,
        )  # fmt: skip
        table.mark(rows, group, count + is_logged)
    if is_logged:
        # In closed form every record grows by the step.
        size = ceil_div(count + 1, 128) if lazy.closed else 1
        launch(
            row_record_kernel, (size,), lazy.log, rows, group, N, V, count, *step, *table.numbers(step, 1.0),
            *table.extension(step), RULE=table.rule, CLOSED=lazy.closed, BLOCK=128,
        )  # fmt: skip
    return is_logged
