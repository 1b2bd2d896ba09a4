"""A process in which Triton interprets its kernels on the CPU.

Triton decides when a kernel is defined whether it is to be interpreted, hence a process of its own. One begins with
seconds of imports, so several modules share it. It takes up to half a minute of one core, so ``conftest.py`` puts the
tests that wait for it first: others fill the second worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "LLMKERN_TEST_REQUIRE": "triton", "OMP_NUM_THREADS": "1"}
_ENVIRONMENT["LLMKERN_TEST_CASES"] = "6"
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5")
TRAFFIC = "kernel_traffic.py"
_TOGETHER = 6


def modules() -> list[str]:
    """Test modules that run kernels on a chosen backend."""
    marks = ("backend: str", "mark.kernels")
    paths = (path for path in sorted(HERE.glob("test_*.py")) if path.name != "test_interpreter.py")
    return [path.name for path in paths if any(mark in path.read_text() for mark in marks)]


def processes() -> list[list[str]]:
    """The modules of one process each; neighbours by name are of one op, mostly."""
    names = modules()
    return [names[i : i + _TOGETHER] for i in range(0, len(names), _TOGETHER)]


def run(*names: str) -> tuple[int, str]:
    """The exit status and the output of test modules, or of the count of the kernels' traffic."""
    files = [f"tests/{name}" for name in names]
    command = [sys.executable, "-W", "ignore", *((*files, "--json") if names == (TRAFFIC,) else (*_PYTEST, *files))]
    # A worker of pytest-xdist tells its children what it is; this child is none.
    environment = {key: value for key, value in _ENVIRONMENT.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout
