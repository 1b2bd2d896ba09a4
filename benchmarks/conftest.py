"""``pytest benchmarks/``: every case under pytest-benchmark, a test per run and implementation."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases and dtypes, not the quick set")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" not in metafunc.fixturenames:
        return
    from .suite import Run

    full = metafunc.config.getoption("--full")
    runs = [
        Run(case, phase, dtype)
        for case in metafunc.module.CASES
        if full or case.quick
        for dtype in (case.dtypes if full else case.dtypes[:1])
        for phase in case.phases
    ]
    metafunc.parametrize("run", runs, ids=[run.id for run in runs])
    metafunc.parametrize("implementation", ["llmkern", "torch"])
