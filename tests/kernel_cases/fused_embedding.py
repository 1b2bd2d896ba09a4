"""Input layers of transformers: BERT's, GPT-2's, and rows of several lengths."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import Case
from llmkern import kernels
from llmkern._groups import FusedEmbeddingInputs, FusedEmbeddingOptions

MODELS: dict[str, dict[str, Any]] = {
    "bert": {"L": 64, "K": 2, "norm": "layer", "bias": True, "p": 0.1},
    "gpt2": {"L": 64, "K": 0, "norm": "none", "bias": False, "p": 0.1},
    "rms": {"L": 0, "K": 0, "norm": "rms", "bias": False, "p": 0.0},
}


def _arguments(device: torch.device, dtype: torch.dtype, V: int, D: int, N: int, model: str) -> tuple[Any, ...]:
    m = MODELS[model]
    table = lambda rows: torch.ones((rows, D), dtype=dtype, device=device) if rows else None  # noqa: E731
    row = lambda wanted: torch.ones(D, dtype=dtype, device=device) if wanted else None  # noqa: E731
    at = torch.arange(N, device=device) % V
    positions = torch.arange(m["L"], device=device) if m["L"] else None
    types = torch.zeros(1, dtype=torch.int64, device=device) if m["K"] else None
    options = FusedEmbeddingOptions(1.0, m["norm"], 1e-5, m["p"], 123456789123, -1, False)
    rows = (at, positions, types)
    inputs = FusedEmbeddingInputs(
        table(V), table(m["L"]), table(m["K"]), row(m["norm"] != "none"), row(m["bias"]), *rows
    )
    return inputs, options


def forward(device: torch.device, **sizes: Any) -> None:
    inputs, options = _arguments(device, **sizes)
    kernels.fused_embedding_forward(inputs, options)


def backward(device: torch.device, dtype: torch.dtype, N: int, D: int, **sizes: Any) -> None:
    inputs, options = _arguments(device, dtype, N=N, D=D, **sizes)
    stats = torch.ones((N, 2), device=device)
    dout = torch.ones((N, D), dtype=dtype, device=device)
    kernels.fused_embedding_backward(dout, inputs, stats, options, 0b11111)


def _tables(model: str) -> int:
    return 1 + (MODELS[model]["L"] > 0) + (MODELS[model]["K"] > 0)


def _forward_floor(dtype: torch.dtype, V: int, D: int, N: int, model: str) -> int:
    """A row of each table for every token: those of positions and types come from the caches, and are counted."""
    stats = 0 if MODELS[model]["norm"] == "none" else 8
    return N * (8 * _tables(model) + D * dtype.itemsize * (_tables(model) + 1) + stats)


def _backward_floor(dtype: torch.dtype, V: int, D: int, N: int, model: str) -> int:
    """The gradient at the sum, then each table's, whose rows are written once."""
    m, tables = MODELS[model], _tables(model)
    reads = 1 + (tables if m["norm"] != "none" else 0)
    return D * dtype.itemsize * (N * (reads + 1 + tables) + V + m["L"] + m["K"])


def _cases(
    name: str, model: str, dtype: torch.dtype, D: int, phases: tuple[str, ...], counted: bool = True
) -> dict[str, Case]:
    large = {"dtype": dtype, "V": 30_522, "D": D, "N": 8192, "model": model}
    small = {"dtype": dtype, "V": 40, "D": 96, "N": 256, "model": model} if counted else None
    # Whole sequences, where there are positions.
    again = {"N": 8192 + max(MODELS[model]["L"], 1)}
    # Beside the rows: orders of the batch, partial sums of long runs and of the norm's gradients, which are of fp32.
    every = {
        "forward": Case(forward, large, small, _forward_floor, again=again),
        "backward": Case(backward, large, small, _backward_floor, 1.25, again),
    }
    return {f"{name} {phase} {dtype}": every[phase] for phase in phases}


BOTH = ("forward", "backward")
CASES = {
    **_cases("bert", "bert", torch.bfloat16, 768, BOTH),
    **_cases("bert", "bert", torch.float32, 768, BOTH),
    **_cases("gpt2", "gpt2", torch.bfloat16, 1024, BOTH),
    **_cases("rms 4096", "rms", torch.bfloat16, 4096, BOTH),
    **_cases("rows of 4096", "bert", torch.float32, 4096, ("backward",), False),
    **_cases("long rows", "bert", torch.bfloat16, 8192, BOTH, False),
    **_cases("short rows", "bert", torch.float32, 300, BOTH, False),
}
