"""``pytest benchmarks/``: every case under pytest-benchmark, a test per run and implementation."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases and dtypes, not the quick set")
    parser.addoption("--against", default="torch", help="peers to measure beside llmkern, comma-separated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" not in metafunc.fixturenames:
        return
    from . import peers
    from .suite import Run, UnknownNameError

    full = metafunc.config.getoption("--full")
    runs = [
        Run(case, phase, dtype)
        for case in metafunc.module.CASES
        for dtype in (case.dtypes if full else case.dtypes[:1])
        for phase in (case.phases if full else case.quick)
    ]
    try:
        names = peers.expand(["llmkern", *metafunc.config.getoption("--against").split(",")])
    except UnknownNameError as error:
        raise pytest.UsageError(str(error)) from error
    metafunc.parametrize("run", runs, ids=[run.id for run in runs])
    # One process has one environment: the variants are for `llmkern bench`.
    metafunc.parametrize("implementation", [name for name in names if "+" not in name])
