"""``pytest benchmarks/``: every case under pytest-benchmark, a test per run and implementation."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases and dtypes, not the quick set")
    parser.addoption("--against", default="torch", help="peers to measure beside llmkern, comma-separated")


def pytest_configure(config: pytest.Config) -> None:
    try:
        _implementations(config)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _implementations(config: pytest.Config) -> list[str]:
    """One process has one environment: the variants are for `llmkern bench`."""
    from . import peers

    return [n for n in peers.expand(["llmkern", *config.getoption("--against").split(",")]) if "+" not in n]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" not in metafunc.fixturenames:
        return
    from .suite import Run

    full = metafunc.config.getoption("--full")
    runs = [
        Run(case, phase, dtype)
        for case in metafunc.module.CASES
        if "cpu" in case.devices
        for dtype in (case.dtypes if full else case.dtypes[:1])
        for phase in (case.phases if full else case.quick)
    ]
    metafunc.parametrize("run", runs, ids=[run.id for run in runs])
    metafunc.parametrize("implementation", _implementations(metafunc.config))
