"""Processes in which Triton interprets its kernels on the CPU.

Triton decides when a kernel is defined whether it is to be interpreted, hence processes of their own. They take minutes
of one core each, so they run beside the other tests, two at a time and at the lowest priority, from the moment that
pytest knows that their results will be asked for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
_ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "LLMKERN_TEST_REQUIRE": "triton", "OMP_NUM_THREADS": "1"}
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5")
TRAFFIC = "kernel_traffic.py"


def modules() -> list[str]:
    """Test modules that run kernels on a chosen backend."""
    marks = ("backend: str", "mark.kernels")
    paths = (path for path in sorted(HERE.glob("test_*.py")) if path.name != "test_interpreter.py")
    return [path.name for path in paths if any(mark in path.read_text() for mark in marks)]


class Interpreters:
    """Runs by name: a test module's, or the count of the kernels' traffic."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._processes: list[subprocess.Popen[str]] = []
        self._runs: dict[str, Future[tuple[int, str]]] = {}

    def start(self, names: list[str]) -> None:
        for name in names:
            arguments = (f"tests/{TRAFFIC}", "--json") if name == TRAFFIC else (*_PYTEST, f"tests/{name}")
            self._runs[name] = self._pool.submit(self._run, *arguments)

    def result(self, name: str) -> tuple[int, str]:
        """The exit status, and what it printed."""
        return self._runs[name].result()

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.kill()

    def _run(self, *arguments: str) -> tuple[int, str]:
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-W", "ignore", *arguments],
            env=_ENVIRONMENT,
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        output = process.communicate()[0]
        return process.returncode, output


interpreters = Interpreters()
