"""One implementation in a process of its own: ``python -m llmkern.benchmarks.worker IMPLEMENTATION``.

Reads one JSON command a line on stdin and answers with one JSON line on stdout:

``{"do": "setup", "run": id}``      builds the case; answers with a fingerprint of its results
``{"do": "time", "seconds": s, "cold": c}``  runs for about s seconds; answers with the seconds of each call; with c
                                    the caches are flushed before each
``{"do": "memory", "run": id}``     builds the case in this fresh process and measures the peak of its first call

An answer is ``{"ok": true, ...}`` or ``{"ok": false, "reason": ...}``; a failure ends the command, not the worker.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import peers, suite


def fingerprint(results: dict[str, Any]) -> dict[str, list[float]]:
    """For each result its norm and four random projections, all in fp64.

    For an error vector e, a projection on random signs has the standard deviation |e|: a handful of numbers bounds
    the relative error between two processes without moving the tensors.
    """
    prints = {}
    for name, value in results.items():
        if hasattr(value, "detach"):
            value = value.detach().double().cpu().numpy()
        flat = np.asarray(value, dtype=np.float64).reshape(-1)
        generator = np.random.default_rng(flat.size)
        total = np.zeros(4)
        for begin in range(0, flat.size, 1 << 20):
            part = flat[begin : begin + (1 << 20)]
            signs = generator.integers(0, 2, (4, part.size), dtype=np.int8) * 2 - 1
            total += signs @ part
        prints[name] = [float(np.linalg.norm(flat)), *total.tolist()]
    return prints


def peak_of(run: Callable[[], Any], device: str) -> int:
    """Bytes of memory that one call needs above what is resident before it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    before = _resident()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    return _status("VmRSS")


class Worker:
    def __init__(self, implementation: str, device: str) -> None:
        self.implementation = peers.load(implementation)
        self.device = device
        self.call: Callable[[], Any] | None = None
        # Twice a large last-level cache: one pass over it leaves nothing else behind.
        self.flush = np.zeros(64 << 20, dtype=np.uint8)

    def setup(self, run: str) -> dict[str, Any]:
        self.call = None
        gc.collect()
        self.call = self.implementation.setup(suite.find(run), self.device)
        return {"fingerprint": fingerprint(self.call())}

    def time(self, seconds: float, cold: bool) -> dict[str, Any]:
        assert self.call is not None, "setup comes first"
        times: list[float] = []
        end = time.perf_counter() + seconds
        while True:
            if cold:
                self.flush += 1
            begin = time.perf_counter()
            results = self.call()
            self.implementation.wait(results)
            now = time.perf_counter()
            del results
            times.append(now - begin)
            if now >= end:
                return {"times": times}

    def memory(self, run: str) -> dict[str, Any]:
        call = self.implementation.setup(suite.find(run), self.device)
        return {"peak": peak_of(lambda: self.implementation.wait(call()), self.device)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not stand between the answers.
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        worker = Worker(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu")
    except Exception as error:
        answer(ok=False, reason=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    answer(ok=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(ok=True, **getattr(worker, command.pop("do"))(**command))
        except Exception as error:
            worker.call = None
            answer(ok=False, reason=f"{type(error).__name__}: {error}".splitlines()[0][:300])


if __name__ == "__main__":
    main()
