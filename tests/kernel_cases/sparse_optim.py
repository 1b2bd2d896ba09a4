"""Steps on the rows of a batch that looks up distinct rows, which is what most of a large table's batches do."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_cases import Case
from llmkern import kernels

FP32, BF16 = torch.float32, torch.bfloat16


def _batch(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.arange(N, device=device) * (V // N)
    return torch.ones(V, D, dtype=dtype, device=device), indices, torch.ones(N, D, dtype=dtype, device=device)


def step(device: torch.device, rule: str, dtype: torch.dtype, state: torch.dtype, V: int, D: int, N: int) -> None:
    rows = _batch(device, dtype, V, D, N)
    states = [torch.ones(V, *[D] * (rule != "rowwise"), dtype=state, device=device) for _ in range(STATES[rule])]
    if rule == "adam":
        kernels.sparse_adam_step(*rows, *states, 3.0, 1e-3, 0.9, 0.99, 1e-8, False, 1.0)
    elif rule == "adagrad":
        kernels.sparse_adagrad_step(*rows, *states, 3.0, 1e-3, 0.0, 1e-8, False, 1.0)
    elif rule == "rowwise":
        kernels.rowwise_adagrad_step(*rows, *states, 1e-3, 1e-8, False, 1.0)
    else:
        kernels.sparse_sgd_step(*rows, 1e-3, False, 1.0)


def norm(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int) -> None:
    kernels.sparse_grad_norm(*_batch(device, dtype, V, D, N)[1:], V)


STATES = {"sgd": 0, "adagrad": 1, "adam": 2, "rowwise": 1}


def floor(rule: str, dtype: torch.dtype, state: torch.dtype, V: int, D: int, N: int) -> int:
    """Each row's gradient, parameter and states, and its index."""
    of_states = 2 * state.itemsize * (1 if rule == "rowwise" else STATES[rule] * D)
    return N * (D * 3 * dtype.itemsize + of_states + 8)


# What orders the rows is small beside rows of 4 KB, which the small case has: some 100 bytes for each position, and of
# chunks the positions twice. Runs of one row read no partial sums.
def _case(rule: str, dtype: torch.dtype, state: torch.dtype, D: int = 128) -> Case:
    sizes = {"rule": rule, "dtype": dtype, "state": state}
    return Case(step, {**sizes, "V": 1_000_000, "D": D, "N": 8192}, {**sizes, "V": 600, "D": 1024, "N": 200}, floor)


CASES = {
    "adam": _case("adam", FP32, FP32),
    "adam bf16, fp32 states": _case("adam", BF16, FP32),
    "adam bf16, fp32 states, wide": _case("adam", BF16, FP32, 2048),
    "sgd": _case("sgd", FP32, FP32),
    "adagrad": _case("adagrad", FP32, FP32),
    "rowwise adagrad": _case("rowwise", FP32, FP32),
    "rowwise adagrad bf16, wide": _case("rowwise", BF16, FP32, 2048),
    "norm": Case(
        norm,
        {"dtype": FP32, "V": 1_000_000, "D": 128, "N": 8192},
        {"dtype": FP32, "V": 600, "D": 1024, "N": 200},
        lambda dtype, V, D, N: N * (D * dtype.itemsize + 8),
    ),
}
