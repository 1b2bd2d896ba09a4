"""A training step of a table of a language model: its rows are eight steps behind."""

from __future__ import annotations

import torch

from kernel_cases import Case
from llmkern import kernels
from llmkern._groups import LazyTable

FP32, BF16 = torch.float32, torch.bfloat16
STATES = {"adam": 2, "amsgrad": 3, "sgd": 0, "momentum": 1, "adagrad": 1}
WAITED = 8


def run(
    device: torch.device,
    phase: str,
    rule: str,
    closed: bool,
    dtype: torch.dtype,
    state: torch.dtype,
    V: int,
    D: int,
    N: int,
) -> None:
    kind = {"amsgrad": "adam", "momentum": "sgd"}.get(rule, rule)
    states = [torch.ones(V, D, dtype=state, device=device) for _ in range(STATES[rule])]
    applied = torch.zeros(V, dtype=torch.int32, device=device)
    # Of steps with a learning rate of 0, which change nothing and cost the same.
    log = torch.ones(4096, 31, dtype=torch.float64, device=device)
    param, rule = torch.ones(V, D, dtype=dtype, device=device), (kind, True, False, False, closed)
    table = LazyTable(param, states, applied, log, WAITED, *rule)
    indices = torch.arange(N, device=device) * (V // N)
    if phase == "lookup":
        kernels.row_lookup(table, indices)
    elif phase == "catch_up":
        kernels.row_catch_up(table, indices)
    elif phase == "catch_up_all":
        kernels.row_catch_up(table, None)
    else:
        values = torch.ones(N, D, dtype=dtype, device=device)
        kernels.row_step(table, indices, values, [9.0, 1e-3, 0.9, 0.99, 1e-8, 0.1], 1.0)


def floor(phase: str, rule: str, closed: bool, dtype: torch.dtype, state: torch.dtype, V: int, D: int, N: int) -> int:
    """Of each row: its index, parameter and states; the lookup writes a result, the others all that they read, and the
    step reads a gradient. In closed form an average that is not decayed is not read by a lookup."""
    rows = V if phase == "catch_up_all" else N
    p, s = D * dtype.itemsize, D * STATES[rule] * state.itemsize
    moved = {"lookup": 2 * p + s, "step": 3 * p + 2 * s}.get(phase, 2 * p + 2 * s)
    return rows * (moved + (0 if phase == "catch_up_all" else 8))


def _case(
    phase: str, rule: str, closed: bool, dtype: torch.dtype = FP32, state: torch.dtype = FP32, allowed: float = 1.1
) -> Case:
    kinds = {"phase": phase, "rule": rule, "closed": closed, "dtype": dtype, "state": state}
    small = {**kinds, "V": 300, "D": 1024, "N": 100}
    return Case(run, {**kinds, "V": 128256, "D": 2048, "N": 8192}, small, floor, allowed)


CASES = {
    "lookup, adam": _case("lookup", "adam", True),
    "step, adam": _case("step", "adam", True),
    "step, amsgrad": _case("step", "amsgrad", True),
    "step, momentum": _case("step", "momentum", True),
    # In the dense gradient's tiles, which are narrower: the records of a row are read for each.
    "step, replayed adam, bf16": _case("step", "adam", False, BF16, FP32, 1.15),
    "catch up, replayed adam": _case("catch_up", "adam", False),
    "catch up all, adam": _case("catch_up_all", "adam", True),
}
