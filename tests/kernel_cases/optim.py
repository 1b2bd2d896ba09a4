"""Optimizer steps of all tensors of a model at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_cases import Case
from llmkern import kernels


def step(device: torch.device, rule: str, dtype: torch.dtype, state: torch.dtype, n: int, after: str = "keep") -> None:
    """Of a matrix and a vector, in two kinds of blocks: full ones and one that is not."""

    def some(dtype: torch.dtype) -> list[Tensor]:
        return [torch.ones(n, dtype=dtype, device=device), torch.ones(7, dtype=dtype, device=device)]

    params, grads, steps = some(dtype), some(dtype), [3.0, 3.0]
    if rule in ("adam", "amsgrad"):
        states = [some(state), some(state), some(state) if rule == "amsgrad" else []]
        kernels.adam_step(params, grads, *states, steps, 1e-3, 0.9, 0.99, 1e-8, 0.1, True, False, 1.0, after)
    elif rule in ("sgd", "momentum"):
        buffers = some(state) if rule == "momentum" else []
        kernels.sgd_step(params, grads, buffers, steps, 1e-3, 0.9, 0.0, 0.1, False, False, 1.0, after)
    else:
        kernels.adagrad_step(params, grads, some(state), steps, 1e-3, 0.0, 0.1, 1e-8, False, 1.0, after)


STATES = {"adam": 2, "amsgrad": 3, "sgd": 0, "momentum": 1, "adagrad": 1}


def floor(rule: str, dtype: torch.dtype, state: torch.dtype, n: int, after: str = "keep") -> int:
    """Everything is read, and all but the gradient written, which may be written too."""
    writes = 1 if after == "keep" else 2
    return (n + 7) * ((2 + writes) * dtype.itemsize + 2 * STATES[rule] * state.itemsize)


def _case(rule: str, dtype: torch.dtype, state: torch.dtype, after: str = "keep") -> Case:
    sizes = {"rule": rule, "dtype": dtype, "state": state, "after": after}
    return Case(step, {**sizes, "n": 1 << 26}, {**sizes, "n": 5000}, floor)


FP32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "adam": _case("adam", FP32, FP32),
    "adam bf16, fp32 states": _case("adam", BF16, FP32),
    "adam bf16, fp32 states, zeroing": _case("adam", BF16, FP32, "zero"),
    "adam bf16": _case("adam", BF16, BF16),
    "amsgrad": _case("amsgrad", FP32, FP32, "scale"),
    "sgd": _case("sgd", FP32, FP32),
    "momentum": _case("momentum", FP32, FP32),
    "adagrad": _case("adagrad", FP32, FP32),
}
