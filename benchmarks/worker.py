"""One implementation in a process of its own: ``python -m llmkern.benchmarks.worker IMPLEMENTATION [DEVICE]``.

Reads one JSON command a line on stdin and answers with one JSON line on stdout:

``{"do": "setup", "run": id}``      builds the case; answers with a fingerprint of its results, and with the bytes that
                                    it now holds and the bytes that are free
``{"do": "time", "seconds": s, "cold": c}``  runs for about s seconds; answers with the seconds of each call; with c
                                    the caches are flushed before each
``{"do": "drop"}``                  lets go of the case
``{"do": "memory", "run": id}``     builds the case in a child process and measures the peak of its first call

An answer is ``{"ok": true, ...}`` or ``{"ok": false, "reason": ...}``; a failure ends the command, not the worker.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import peers, suite

PROJECTIONS, BLOCK = 8, 1 << 15


def fingerprint(results: dict[str, Any]) -> dict[str, list[float]]:
    """For each result its norm and a few random projections, all in fp64.

    For an error vector e, a projection on random signs has the standard deviation |e|: a handful of numbers bounds
    the relative error between two processes without moving the tensors. The signs of an element are those of its
    place in a block times those of the block.
    """
    generator = np.random.default_rng(0)
    signs = generator.choice([-1.0, 1.0], (PROJECTIONS, BLOCK))
    prints = {}
    for name, value in results.items():
        # numpy has no bf16; every other array is taken block by block as it is.
        flat = value.detach().float().cpu().numpy() if _is_bf16(value) else _array(value)
        flat = flat.reshape(-1)
        generator = np.random.default_rng(flat.size)
        total, squares = np.zeros(PROJECTIONS), 0.0
        for begin in range(0, flat.size, BLOCK):
            part = flat[begin : begin + BLOCK].astype(np.float64)
            # einsum, not BLAS, whose threads would fight with those of the other workers.
            with np.errstate(all="ignore"):
                projected = np.einsum("ij,j->i", signs[:, : part.size], part)
                total += generator.choice([-1.0, 1.0], PROJECTIONS) * projected
                squares += float(np.einsum("i,i->", part, part))
        prints[name] = [squares**0.5, *total.tolist()]
    return prints


def _is_bf16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    # TensorFlow's scalars of bf16 are no arrays by themselves.
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def peak_of(run: Callable[[], Any], device: str) -> int:
    """Bytes of memory that one call needs above what is resident before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, code = _status("VmRSS"), _status("RssFile")
    results = run()
    # Pages of libraries that the call is the first to touch are not its memory.
    peak = _status("VmHWM") - before - (_status("RssFile") - code)
    del results
    return max(0, peak)


def _status(key: str, file: str = "/proc/self/status") -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {key}; memory is measured on Linux only")


class Worker:
    def __init__(self, implementation: str, device: str) -> None:
        self.implementation = peers.load(implementation)
        self.device = device
        self.call: suite.Call | None = None
        self.empty = self._held()

    def _held(self) -> int:
        return torch.cuda.memory_reserved() if self.device == "cuda" else _status("VmRSS")

    def setup(self, run: str) -> dict[str, Any]:
        self.drop()
        self.call = self.implementation.setup(suite.find(run), self.device)
        prints = fingerprint(self.call())
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else _status("MemAvailable", "/proc/meminfo")
        return {"fingerprint": prints, "held": max(0, self._held() - self.empty), "free": free}

    def drop(self) -> dict[str, Any]:
        self.call = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {}

    def time(self, seconds: float, cold: bool) -> dict[str, Any]:
        assert self.call is not None, "setup comes first"
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            if cold:
                self.implementation.flush()
            times.append(self._on_gpu() if self.device == "cuda" else self._once())
        return {"times": times}

    def _once(self) -> float:
        assert self.call is not None
        begin = time.perf_counter()
        results = self.call()
        self.implementation.wait(results)
        now = time.perf_counter()
        # Whoever made the results frees them outside the clock, like whoever uses them.
        del results
        return now - begin

    def _on_gpu(self) -> float:
        """The GPU's own time from the first kernel to the last, without the launch of the first."""
        assert self.call is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def memory(self, run: str) -> dict[str, Any]:
        """Measures in a forked child, which is as fresh as this process: it must have run nothing itself."""
        # The first step of an optimizer imports this; the import is not the step's memory.
        import torch._dynamo  # noqa: F401

        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.write(writer, json.dumps(self._peak(run)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answers:
            text = answers.read()
        os.waitpid(child, 0)
        return {"peak": json.loads(text) if text else None}

    def _peak(self, run: str) -> int:
        call = self.implementation.setup(suite.find(run), self.device)

        def once() -> Any:
            results = call()
            self.implementation.wait(results)
            return results

        if self.implementation.compiles:
            once()
        return peak_of(once, self.device)


def main() -> None:
    # An interrupt is for the runner, which closes the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not stand between the answers.
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    def refuse(error: Exception) -> None:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        absent = isinstance(error, peers.AbsentError)
        answer(ok=False, absent=absent, reason=first if absent else f"{type(error).__name__}: {first}")

    try:
        worker = Worker(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu")
    except Exception as error:
        refuse(error)
        return
    answer(ok=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(ok=True, **getattr(worker, command.pop("do"))(**command))
        except Exception as error:
            worker.drop()
            refuse(error)


if __name__ == "__main__":
    main()
