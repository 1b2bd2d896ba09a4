"""Lookups in tables of 8 and 4 bits; torch's version is its own quantised embedding. Floor: each row that occurs is
read once, with its scale and offset, and the output written once: that is most of it.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch

from .bench_embedding import indices_of, rows_of
from .suite import Call, Case, Cost, Place, Run, measure


def draw(ns: SimpleNamespace, sizes: dict[str, Any], place: Place) -> tuple[torch.nn.Module, torch.Tensor]:
    """The quantised module of ``ns`` and indices (N)."""
    V, D, N, bits = (sizes[key] for key in ("V", "D", "N", "bits"))
    g = place.generator()
    weight = place(torch.randn(V, D, generator=g))
    indices = place(indices_of("uniform", V, N, g))
    if hasattr(ns.nn, "QuantizedEmbedding"):
        import llmkern

        return llmkern.quantize_embedding(weight, bits), indices
    return _torch_class(weight, bits), indices


def _torch_class(weight: torch.Tensor, bits: int) -> torch.nn.Module:
    dtype = torch.quint8 if bits == 8 else torch.quint4x2
    scheme = torch.per_channel_affine_float_qparams
    observer = torch.ao.quantization.PerChannelMinMaxObserver(dtype=dtype, qscheme=scheme, ch_axis=0)
    observer(weight)
    scale, zero = observer.calculate_qparams()
    with warnings.catch_warnings():
        # Of their deprecation.
        warnings.simplefilter("ignore")
        module = torch.ao.nn.quantized.Embedding(weight.shape[0], weight.shape[1], dtype=dtype)
        module.set_weight(torch.quantize_per_channel(weight, scale.float(), zero.float(), 0, dtype))
    return module


def make(V: int, D: int, N: int, bits: int, quick: tuple[str, ...] = ()) -> Case:
    sizes = {"V": V, "D": D, "N": N, "bits": bits}

    def cost(phase: str, itemsize: int) -> Cost:
        rows = rows_of("uniform", V, N)
        return Cost(2.0 * N * D, rows * (D * bits / 8 + 8) + 8 * N, N * D * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        module, indices = draw(ns, sizes, place)
        # torch keeps the scales of 4 bits in fp16.
        compares = bits == 8 or hasattr(ns.nn, "QuantizedEmbedding")

        def run() -> dict[str, Any]:
            with torch.no_grad():
                out = module(indices)
            return {"out": out} if compares else {}

        return run

    name = f"quantized_embedding/{V}x{D}x{N}/int{bits}"
    return Case(
        "quantized_embedding",
        name,
        "quantized_embedding",
        ("forward",),
        cost,
        setup,
        sizes,
        dtypes=("fp32",),
        quick=quick,
        exact=V * D < 5e7,
    )


SIZES = ((32000, 512, 8192), (128256, 2048, 8192), (1_000_000, 128, 65536))
CASES = [make(*size, bits) for size in SIZES for bits in (8, 4)]


def test_quantized_embedding(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
