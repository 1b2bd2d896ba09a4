"""Processes in which Triton interprets its kernels on the CPU.

Triton decides when a kernel is defined whether it is to be interpreted, hence a process of its own. It takes a hundred
times as long as a kernel, and gives the same results from the same sources: ``interpreted.csv`` keeps of each test
module a digest of what its results depend on, and tests run again what has changed since. Of some others they run one
case of each test, for the ways from a call to a kernel. ``python tests/interpreter.py --write`` runs what has changed
and keeps the digests of what passed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE / "interpreted.csv"
_ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "LLMKERN_TEST_REQUIRE": "triton", "OMP_NUM_THREADS": "1"}
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5")
TRAFFIC = "kernel_traffic.py"
# What runs in any case.
SAMPLE = (
    "test_cross_entropy_kernels.py",
    "test_embedding.py",
    "test_mse_loss.py",
    "test_optim.py",
    "test_rnn_kernels.py",
)
# Modules of a process, which begins with seconds of imports; neighbours by name are of one op, mostly.
_TOGETHER = 6
_KERNELS = (
    "kernels/*.py",
    "llmkern/reference/*.py",
    "llmkern/_facts.py",
    "llmkern/_groups.py",
    "llmkern/ops/_library.py",
)
_HELPERS = ("tests/checks.py", "tests/conftest.py", "tests/optimizers.py", "tests/recurrent.py", "tests/row_tables.py")


def modules() -> list[str]:
    """Test modules that run kernels on a chosen backend."""
    marks = ("backend: str", "mark.kernels")
    paths = (path for path in sorted(HERE.glob("test_*.py")) if path.name != "test_interpreter.py")
    return [path.name for path in paths if any(mark in path.read_text() for mark in marks)]


def digest(name: str) -> str:
    """Of a test module, the kernels, what they are compared with, and the version of Triton."""
    found, helpers = (
        hashlib.sha256(version("triton").encode()),
        ("tests/kernel_cases/*.py",) if name == TRAFFIC else _HELPERS,
    )
    for pattern in (*_KERNELS, *helpers, f"tests/{name}"):
        for path in sorted(HERE.parent.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def changed() -> list[str]:
    """Modules that have not passed as they are, and the traffic."""
    with RECORD.open(newline="") as file:
        passed = dict(csv.reader(file))
    return [name for name in (TRAFFIC, *modules()) if passed.get(name) != digest(name)]


def processes(names: list[str]) -> list[list[str]]:
    return [names[i : i + _TOGETHER] for i in range(0, len(names), _TOGETHER)]


def faults(*names: str, cases: int = 6) -> str:
    """What test modules print that do not pass, with at most ``cases`` of each test; or which kernels move more than
    their case allows."""
    files = [f"tests/{name}" for name in names]
    traffic = names == (TRAFFIC,)
    command = [sys.executable, "-W", "ignore", *((*files, "--json") if traffic else (*_PYTEST, *files))]
    # A worker of pytest-xdist tells its children what it is; this child is none.
    environment = {key: value for key, value in _ENVIRONMENT.items() if not key.startswith("PYTEST_")}
    environment["LLMKERN_TEST_CASES"] = str(cases)
    done = subprocess.run(
        command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # 5: every test of the modules is for other backends.
    if done.returncode not in ((0,) if traffic else (0, 5)):
        return done.stdout[-8000:]
    if not traffic:
        return ""
    rows = json.loads(done.stdout.splitlines()[-1])
    wrong = {case: row for case, row in rows.items() if not 1 <= row["ratio"] <= row["allowed"]}
    return str(wrong) if wrong or not rows else ""


def write() -> int:
    """Runs what has changed, two modules at a time, and keeps what passed after each; how many failed."""
    failed = 0
    RECORD.touch()
    with ThreadPoolExecutor(2) as pool:
        names = changed()
        for name, wrong in zip(names, pool.map(faults, names), strict=True):
            print(f"{name}: {wrong or 'passed'}", flush=True)
            if wrong:
                failed += 1
                continue
            with RECORD.open(newline="") as file:
                passed = dict(csv.reader(file))
            passed[name] = digest(name)
            with RECORD.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    (n, passed[n]) for n in (TRAFFIC, *modules()) if n in passed
                )
    return failed


if __name__ == "__main__":
    if "--write" in sys.argv:
        sys.exit(write())
    print(*changed(), sep="\n")
