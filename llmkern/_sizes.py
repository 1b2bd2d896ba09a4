"""Why ``auto`` leaves a call that a kernel serves to another backend: rules of dtype and size."""

from __future__ import annotations

import torch


def linear_is_faster_in_torch(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Measured: benchmarks/bench_linear.py."""
    if sizes["transformed"]:
        return "torch.func batches torch's own product"
    if dtype != torch.float32:
        return f"torch's product of {dtype} is faster"
    return None if sizes["products"] >= 1 << 21 else "too small to gain"


def the_product_is_torchs(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    return "would call torch's product too"


def batched_by_torch(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    return "torch.func batches torch's own function" if sizes.get("mapped") else None


def composition_is_better(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    return "torch.func batches the composition" if sizes["transformed"] else None


def small_steps_are_quick(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Measured: benchmarks/bench_fused_embedding.py. A call of the op costs some 15 us more than three of torch's."""
    enough = 1 << 13 if sizes["dropout"] else 1 << 16
    return None if sizes["elements"] >= enough else "too small to gain"


def lstm_is_faster_in_torch(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Measured: benchmarks/bench_rnn.py. oneDNN's forward is up to 13% faster where many sequences share small weights;
    it has no packed sequences, projections or options."""
    if not sizes["plain"] or sizes["graph"] or sizes["T"] == 1 or sizes["B"] < 32:
        return None
    small = {torch.float32: 128, torch.bfloat16: 512}.get(dtype, 0)
    return "torch's forward without gradients is faster at this size" if sizes["H"] <= small else None


def cell_is_faster_in_torch(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Measured: benchmarks/bench_rnn.py, lstmcell."""
    if dtype == torch.bfloat16 and sizes["graph"] and sizes["B"] >= 32:
        return "torch's steps with gradients in bfloat16 are faster at this size"
    return None


def cudnn_was_not_compared_with(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """What torch's cells and layers serve on a GPU stays theirs until a benchmark says otherwise."""
    return "not yet measured against cuDNN on a GPU: backend('triton') takes it" if sizes["torchs"] else None
