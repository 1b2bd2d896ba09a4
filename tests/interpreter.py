"""A process in which Triton interprets its kernels on the CPU.

Triton decides when a kernel is defined whether it is to be interpreted, hence a process of its own. One takes up to
minutes of one core, so ``conftest.py`` puts the tests that wait for them first: others fill the second worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "LLMKERN_TEST_REQUIRE": "triton", "OMP_NUM_THREADS": "1"}
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5")
TRAFFIC = "kernel_traffic.py"


def modules() -> list[str]:
    """Test modules that run kernels on a chosen backend."""
    marks = ("backend: str", "mark.kernels")
    paths = (path for path in sorted(HERE.glob("test_*.py")) if path.name != "test_interpreter.py")
    return [path.name for path in paths if any(mark in path.read_text() for mark in marks)]


def run(name: str) -> tuple[int, str]:
    """The exit status and the output of a test module, or of the count of the kernels' traffic."""
    arguments = (f"tests/{TRAFFIC}", "--json") if name == TRAFFIC else (*_PYTEST, f"tests/{name}")
    command = [sys.executable, "-W", "ignore", *arguments]
    # A worker of pytest-xdist tells its children what it is; this child is none.
    environment = {key: value for key, value in _ENVIRONMENT.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout
