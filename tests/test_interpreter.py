"""The Triton kernels on the CPU: the tests of every op again under the interpreter, and the bytes that kernels move."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import interpreter
import pytest
from checks import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="this is the interpreter"),
    pytest.mark.skipif(find_spec("triton") is None, reason="no Triton"),
]

CHANGED = interpreter.changed() if find_spec("triton") is not None else []
MODULES = [name for name in CHANGED if name != interpreter.TRAFFIC]
SAMPLE = [name for name in interpreter.SAMPLE if name not in CHANGED]


@pytest.mark.parametrize("names", interpreter.processes(MODULES), ids=" ".join)
def test_modules_that_have_changed(names: list[str]) -> None:
    assert interpreter.faults(*names) == ""


@pytest.mark.parametrize("name", SAMPLE)
def test_one_case_of_others(name: str) -> None:
    assert interpreter.faults(name, cases=1) == ""


@pytest.mark.parametrize("name", {interpreter.TRAFFIC}.intersection(CHANGED))
def test_no_kernel_moves_more_than_its_case_allows(name: str) -> None:
    assert interpreter.faults(name) == ""


def test_what_failed_or_has_changed_runs_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    record.touch()
    every = [interpreter.TRAFFIC, *interpreter.modules()]
    monkeypatch.setattr(interpreter, "RECORD", record)
    assert interpreter.changed() == every
    monkeypatch.setattr(interpreter, "faults", lambda name: "wrong" * (name == every[1]))
    assert interpreter.write() == 1
    assert interpreter.changed() == [every[1]]
    digest = interpreter.digest
    monkeypatch.setattr(interpreter, "digest", lambda name: "other" if name == every[0] else digest(name))
    assert interpreter.changed() == every[:2]
