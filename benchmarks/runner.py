"""Runs cases on several implementations, interleaved, each in its own process.

For every run the workers take turns in short slices, in an order that rotates, so that whatever else the machine does
hits all alike. A peer's ratio is the median over the rounds of (its slice / our slice), which noise that lasts longer
than a round does not move. Memory is measured on the first call of a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import machine, peers
from .suite import ITEMSIZE, Run

OURS = "llmkern"


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message is its reason."""


class Process:
    """A worker process: one implementation."""

    def __init__(self, implementation: str, device: str) -> None:
        _, variant = peers.split(implementation)
        command = [sys.executable, "-m", f"{__package__}.worker", implementation, device]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **variant},
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"the process ended ({'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)})")
        answer = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(answer["reason"])
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerError("the process has ended") from error
        return self._read()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Measurement:
    """One implementation on one run. Seconds; ``ratio`` is its time over ours; ``reason`` says why there is none."""

    median: float | None = None
    low: float | None = None
    high: float | None = None
    cold: float | None = None
    ratio: float | None = None
    peak: int | None = None
    error: float | None = None
    match: bool | None = None
    reason: str | None = None


@dataclass
class Row:
    """One run with all its measurements: a row of the report."""

    id: str
    op: str
    case: str
    dtype: str
    phase: str
    sizes: dict[str, Any]
    flops: float
    bytes: float
    scaling: tuple[str, str, float] | None = None
    floor: float | None = None
    bound: str | None = None
    results: dict[str, Measurement] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Our share of the machine's limit."""
        ours = self.results.get(OURS)
        return self.floor / ours.median if self.floor and ours and ours.median else None

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest peer and its time over ours."""
        ratios = {n: m.ratio for n, m in self.results.items() if n != OURS and m.ratio is not None}
        return min(ratios.items(), key=lambda item: item[1]) if ratios else None


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    implementations: tuple[str, ...]
    device: str = "cpu"
    rounds: int = 5
    slice: float = 0.15
    memory: bool = True
    cold: bool = False


class Runner:
    """Holds the workers of a plan; ``rows`` measures runs one by one. Use as a context manager."""

    def __init__(self, plan: Plan, limits: dict[str, float]) -> None:
        self.plan, self.limits = plan, limits
        self._workers: dict[str, Process] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _worker(self, name: str) -> Process:
        if name not in self._workers:
            self._workers[name] = Process(name, self.plan.device)
        return self._workers[name]

    def _drop(self, name: str) -> None:
        if worker := self._workers.pop(name, None):
            worker.close()

    def rows(self, runs: list[Run], progress: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
        """Measures the runs in order and yields each as it is done."""
        for run in runs:
            progress(run.id)
            yield self.row(run)

    def row(self, run: Run) -> Row:
        cost = run.case.cost(run.phase, ITEMSIZE[run.dtype])
        row = Row(
            id=run.id,
            op=run.case.op,
            case=run.case.name,
            dtype=run.dtype,
            phase=run.phase,
            sizes=run.case.sizes,
            flops=cost.flops,
            bytes=cost.reads + cost.writes,
            scaling=run.case.scaling,
        )
        # The limits hold for all threads.
        if run.case.threads is None and (floor := machine.floor(cost, run.dtype, self.limits)):
            row.floor, row.bound = floor
        prints: dict[str, dict[str, list[float]]] = {}
        for name in self.plan.implementations:
            row.results[name] = result = Measurement(reason=peers.missing(name))
            if result.reason is None:
                try:
                    prints[name] = self._worker(name).ask(do="setup", run=run.id)["fingerprint"]
                except WorkerError as error:
                    result.reason = str(error)
                    self._drop(name)
        self._time(row, [name for name in self.plan.implementations if name in prints])
        self._match(run, row, prints)
        if self.plan.memory:
            self._memory(run, row, [name for name in prints if "+" not in name])
        return row

    def _time(self, row: Row, names: list[str]) -> None:
        slices: dict[str, list[float]] = {name: [] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for r in range(self.plan.rounds + 1):
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                if row.results[name].reason is not None:
                    continue
                try:
                    sample = self._worker(name).ask(do="time", seconds=self.plan.slice, cold=False)["times"]
                    if r == self.plan.rounds and self.plan.cold:
                        cold = self._worker(name).ask(do="time", seconds=self.plan.slice, cold=True)["times"]
                        row.results[name].cold = statistics.median(cold)
                except WorkerError as error:
                    row.results[name].reason = str(error)
                    self._drop(name)
                    continue
                # The first round warms up: caches, workspaces, a compiler.
                if r > 0:
                    times[name] += sample
                    slices[name].append(statistics.median(sample))
        for name in names:
            result = row.results[name]
            if result.reason is not None:
                continue
            result.median = statistics.median(times[name])
            result.low, result.high = _quartiles(slices[name])
            if OURS in slices and row.results[OURS].reason is None:
                result.ratio = statistics.median(t / o for t, o in zip(slices[name], slices[OURS], strict=True))

    def _match(self, run: Run, row: Row, prints: dict[str, dict[str, list[float]]]) -> None:
        """Compares every implementation's results with the fp64 reference, or where that is too large, torch's fp32."""
        name, dtype = ("reference", run.dtype) if run.case.exact else ("torch", "fp32")
        try:
            reference = self._worker(name).ask(do="setup", run=Run(run.case, run.phase, dtype).id)["fingerprint"]
        except WorkerError:
            self._drop(name)
            return
        for implementation, got in prints.items():
            row.results[implementation].error = _distance(got, reference)
        own = row.results["torch"].error if "torch" in row.results else None
        for implementation in prints:
            error = row.results[implementation].error
            if error is not None:
                bound = _TOLERANCE[run.dtype] + 2 * (own or 0.0)
                row.results[implementation].match = error <= bound

    def _memory(self, run: Run, row: Row, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(WorkerError):
                process = Process(name, self.plan.device)
                try:
                    row.results[name].peak = process.ask(do="memory", run=run.id)["peak"]
                finally:
                    process.close()


_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _distance(got: dict[str, list[float]], reference: dict[str, list[float]]) -> float | None:
    """The largest relative error over the results that both have; NaN or infinity where they differ in kind."""
    worst: float | None = None
    for name, (norm, *projections) in reference.items():
        if name in got:
            error = math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(got[name][1:], projections, strict=True)))
            relative = error / norm if norm else error
            worst = relative if worst is None else max(worst, relative)
    return worst
