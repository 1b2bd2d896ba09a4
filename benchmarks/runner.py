"""Runs cases on several implementations, interleaved, each in its own process.

For every run the workers take turns in short slices, in an order that rotates, so that whatever else the machine does
hits all alike. A peer's ratio is the median over the rounds of (its slice / our slice), which noise that lasts longer
than a round does not move. Where the workers do not all fit into memory, they take turns in groups, each with ours.
Memory is measured on the first call of a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import machine, peers
from .result import OURS, Measurement, Row
from .suite import Run

Prints = dict[str, list[float]]


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message is its reason. ``absent``: there is nothing to measure."""

    def __init__(self, reason: str, absent: bool = False) -> None:
        super().__init__(reason)
        self.absent = absent


class Process:
    """A worker process: one implementation. If it does not answer within ``patience`` seconds, it is ended."""

    def __init__(self, implementation: str, device: str, patience: float = 300) -> None:
        self._patience = patience
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", implementation, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **peers.split(implementation)[1]},
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._patience, end)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            died = f"the process ended ({'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)})"
            raise WorkerError(f"no answer within {self._patience:.0f} s" if late.is_set() else died)
        answer = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(answer["reason"], answer["absent"])
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


@dataclass(frozen=True)
class Plan:
    """Whom to measure, how long and how often.

    Attributes:
        implementations: ours, then the peers.
        device: "cpu" or "cuda".
        rounds: turns of each in a run; at least three of them, if there are as many, whatever ``budget`` says.
        slice: seconds of a turn, at least one call.
        budget: seconds that a run's turns may take together before rounds are left out.
        memory: measure the peak memory as well.
        cold: time cases that fit into a cache with flushed caches as well.
    """

    implementations: tuple[str, ...]
    device: str = "cpu"
    rounds: int = 5
    slice: float = 0.15
    budget: float = 30.0
    memory: bool = True
    cold: bool = True


class Runner:
    """Holds the workers of a plan; ``rows`` measures runs one by one. Use as a context manager."""

    def __init__(self, plan: Plan, limits: dict[str, float]) -> None:
        self.plan, self.limits = plan, limits
        self._workers: dict[str, Process] = {}
        # Processes that never run anything themselves, for measuring memory in their children.
        self._fresh: dict[str, Process] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._workers.values(), *self._fresh.values()):
            worker.close()
        self._workers.clear()
        self._fresh.clear()

    def _worker(self, name: str) -> Process:
        if name not in self._workers:
            self._workers[name] = Process(name, self.plan.device)
        return self._workers[name]

    def rows(self, runs: list[Run], progress: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
        """Measures the runs in order and yields each as it is done."""
        for run in runs:
            yield self.row(run, progress)

    def row(self, run: Run, progress: Callable[[str], None] = lambda text: None) -> Row:
        """Measures one run; whatever fails is in the row with its reason."""
        row = self._blank(run)
        for name in self.plan.implementations:
            reason = peers.not_here(name, self.plan.device) or peers.has_no(name, run)
            row.results[name] = Measurement(reason=reason, absent=reason is not None)
        prints: dict[str, Prints] = {}
        progress(f"{run.id}: {OURS}")
        room = self._setup(OURS, run, row, prints)
        rest = [name for name in row.results if name != OURS and row.results[name].reason is None]
        for begin in range(0, len(rest), room) if rest else (0,):
            ready = [OURS] if OURS in prints else []
            for name in rest[begin : begin + room]:
                progress(f"{run.id}: {name}")
                ready += [name] if self._setup(name, run, row, prints) else []
            progress(f"{run.id}: all in turns")
            self._time(row, ready)
            for name in ready:
                if name != OURS:
                    self._drop(name)
        self._drop(OURS)
        progress(f"{run.id}: the reference")
        self._match(run, row, prints)
        for name in prints if self.plan.memory else ():
            if "+" not in name and row.results[name].reason is None:
                progress(f"{run.id}: memory of {name}")
                row.results[name].peak = self._peak(name, run)
        return row

    def _blank(self, run: Run) -> Row:
        cost, case = run.cost, run.case
        # The limits hold for all threads.
        floor = machine.floor(cost, run.dtype, self.limits) if case.threads is None else None
        return Row(
            id=run.id,
            op=case.op,
            case=case.name,
            dtype=run.dtype,
            phase=run.phase,
            sizes=case.sizes,
            flops=cost.flops,
            reads=cost.reads,
            writes=cost.writes,
            quick=run.phase in case.quick,
            scaling=case.scaling,
            floor=floor[0] if floor else None,
            bound=floor[1] if floor else None,
        )

    def _setup(self, name: str, run: Run, row: Row, prints: dict[str, Prints]) -> int:
        """Makes a worker ready; returns how many more workers with as much memory there is room for, or 0 if it failed
        (if ours failed, 1: the peers go on)."""
        if row.results.setdefault(name, Measurement()).reason is not None:
            return 0
        try:
            answer = self._worker(name).ask(do="setup", run=run.id)
        except WorkerError as error:
            self._fail(row, name, error)
            return int(name == OURS)
        prints[name] = answer["fingerprint"]
        return max(1, int(0.7 * answer["free"] / max(1, answer["held"])))

    def _fail(self, row: Row, name: str, error: WorkerError) -> None:
        row.results[name].reason, row.results[name].absent = str(error), error.absent
        if not error.absent:
            # Whatever state it is in, the next run gets a new one.
            self._close(name)

    def _close(self, name: str) -> None:
        if worker := self._workers.pop(name, None):
            worker.close()

    def _drop(self, name: str) -> None:
        if name in self._workers:
            try:
                self._workers[name].ask(do="drop")
            except WorkerError:
                self._close(name)

    def _time(self, row: Row, names: list[str]) -> None:
        """Times these in turns and puts the medians and, if ours is among them, the ratios into the row."""
        cold = self.plan.cold and row.bytes < peers.cache_bytes()
        turns = [(name, flushed) for name in names for flushed in ((False, True) if cold else (False,))]
        times: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
        slices: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
        rounds, r = self.plan.rounds, 0
        while r <= rounds:
            begin = time.perf_counter()
            for i in range(len(turns)):
                name, flushed = turn = turns[(i + r) % len(turns)]
                if row.results[name].reason is not None:
                    continue
                try:
                    seconds = self.plan.slice / (2 if flushed else 1)
                    sample = self._worker(name).ask(do="time", seconds=seconds, cold=flushed)["times"]
                except WorkerError as error:
                    self._fail(row, name, error)
                    continue
                # The first round warms up: caches, workspaces, a compiler.
                if r > 0:
                    times[turn] += sample
                    slices[turn].append(statistics.median(sample))
            if r == 1:
                affordable = int(self.plan.budget / (time.perf_counter() - begin))
                rounds = min(rounds, max(3, affordable))
            r += 1
        for name in names:
            if row.results[name].reason is None:
                _summarize(row.results[name], name, times, slices)

    def _match(self, run: Run, row: Row, prints: dict[str, Prints]) -> None:
        """Compares every implementation's results with the reference's."""
        try:
            reference = self._worker("reference").ask(do="setup", run=run.id)["fingerprint"]
        except WorkerError:
            self._close("reference")
            return
        self._drop("reference")
        errors = {name: distance(got, reference) for name, got in prints.items()}
        for name, error in errors.items():
            if error is not None:
                bound = _TOLERANCE[run.dtype] + 2 * (errors.get("torch") or 0.0)
                row.results[name].error, row.results[name].match = error, error <= bound

    def _peak(self, name: str, run: Run) -> int | None:
        with contextlib.suppress(WorkerError):
            if name not in self._fresh:
                self._fresh[name] = Process(name, self.plan.device)
            return self._fresh[name].ask(do="memory", run=run.id)["peak"]
        if name in self._fresh:
            self._fresh.pop(name).close()
        return None


# An error of the results' norm; twice torch's own error is allowed on top.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def _summarize(
    result: Measurement,
    name: str,
    times: dict[tuple[str, bool], list[float]],
    slices: dict[tuple[str, bool], list[float]],
) -> None:
    """Medians, quartiles over the rounds and ratios of one implementation. Ours takes part in every group of peers:
    its first numbers stand."""
    warm, cold = (name, False), (name, True)
    if result.median is None:
        result.median = statistics.median(times[warm])
        result.low, result.high = _quartiles(slices[warm])
        result.cold = statistics.median(times[cold]) if cold in times else None
    result.ratio = _ratio(slices[warm], slices.get((OURS, False)))
    result.cold_ratio = _ratio(slices.get(cold), slices.get((OURS, True)))


def _ratio(theirs: list[float] | None, ours: list[float] | None) -> float | None:
    # Ours may have failed on the way.
    if not theirs or not ours or len(theirs) != len(ours):
        return None
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def distance(got: Prints, reference: Prints) -> float | None:
    """The largest relative error over the results that both have; NaN or infinity where they differ in kind."""
    worst: float | None = None
    for name, (norm, *projections) in reference.items():
        if name in got:
            error = math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(got[name][1:], projections, strict=True)))
            relative = error / norm if norm else error
            worst = relative if worst is None or not relative <= worst else worst
    return worst
