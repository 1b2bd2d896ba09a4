"""The Triton kernels on the CPU: the tests of every op again, in processes where Triton interprets its kernels.

Triton decides when a kernel is defined whether it is to be interpreted, hence the processes; two at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETER = {**os.environ, "TRITON_INTERPRET": "1", "LLMKERN_TEST_REQUIRE": "triton", "OMP_NUM_THREADS": "1"}
pytestmark = [
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the interpreter"),
    pytest.mark.skipif(find_spec("triton") is None, reason="no Triton"),
]

# Test modules that run kernels on a chosen backend.
MODULES = [
    path.name
    for path in sorted(HERE.glob("test_*.py"))
    if path != Path(__file__) and any(mark in path.read_text() for mark in ("backend: str", "mark.kernels"))
]


def interpret(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=INTERPRETER, cwd=HERE.parent, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Every module's run, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        pytest_run = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5")
        yield {name: pool.submit(interpret, *pytest_run, f"tests/{name}") for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = runs[name].result()
    # 5: every test of the module is for other backends.
    assert result.returncode in (0, 5), result.stdout[-8000:] + result.stderr[-2000:]


def test_traffic() -> None:
    """No kernel moves more than its case allows."""
    result = interpret("tests/kernel_traffic.py", "--json")
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    assert rows
    assert [(name, row) for name, row in rows.items() if not 1 <= row["ratio"] <= row["allowed"]] == []
