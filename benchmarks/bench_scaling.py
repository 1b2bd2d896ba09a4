"""How time and memory grow with T, B, V, N and the number of threads: points on curves, fp32, forward + backward."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from . import bench_cross_entropy, bench_embedding, bench_linear_cross_entropy, bench_rnn
from .suite import Case, Run, measure


def point(case: Case, axis: str, value: int, threads: int | None = None) -> Case:
    return replace(
        case,
        op="scaling",
        name=f"scaling/{axis}/{case.name}" + (f"/threads={threads}" if threads else ""),
        phases=("forward+backward",),
        dtypes=("fp32",),
        scaling=(f"{case.name.split('/')[0]} over {axis}", axis, value),
        threads=threads,
        quick=(),
        exact=False,
    )


def _threads() -> list[int]:
    count, steps = os.cpu_count() or 1, [1]
    while steps[-1] * 2 <= count:
        steps.append(steps[-1] * 2)
    return steps


CASES = [
    *(point(bench_rnn.make("LSTM", T, 32, 256, 256), "T", T) for T in (8, 32, 128, 512)),
    *(point(bench_rnn.make("LSTM", 64, B, 256, 256), "B", B) for B in (1, 4, 16, 64)),
    *(point(bench_cross_entropy.make(1024, V), "V", V) for V in (1000, 10000, 50000, 200000)),
    *(point(bench_linear_cross_entropy.make(1024, 256, V), "V", V) for V in (1000, 8000, 64000)),
    *(point(bench_embedding.make(V, 128, 4096), "V", V) for V in (10_000, 100_000, 1_000_000)),
    *(point(bench_linear_cross_entropy.make(N, 256, 16000), "N", N) for N in (256, 1024, 4096)),
    *(point(bench_embedding.make(32000, 128, N), "N", N) for N in (256, 4096, 65536)),
    *(point(bench_rnn.make("LSTM", 64, 32, 512, 512), "threads", n, n) for n in _threads()),
    *(point(bench_cross_entropy.make(2048, 16000), "threads", n, n) for n in _threads()),
    *(point(bench_linear_cross_entropy.make(1024, 256, 16000), "threads", n, n) for n in _threads()),
    *(point(bench_embedding.make(32000, 512, 8192), "threads", n, n) for n in _threads()),
]


def test_scaling(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
