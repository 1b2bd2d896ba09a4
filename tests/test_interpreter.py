"""The Triton kernels on the CPU: the tests of every op again under the interpreter, and the bytes that kernels move."""

from __future__ import annotations

import json
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
SAME = [name for name in interpreter.modules() if name not in CHANGED]


def _pass(names: list[str], cases: int) -> None:
    code, output = interpreter.run(*names, cases=cases)
    # 5: every test of the modules is for other backends.
    assert code in (0, 5), output[-8000:]


@pytest.mark.parametrize("names", interpreter.processes(CHANGED), ids=" ".join)
def test_modules_that_have_changed(names: list[str]) -> None:
    _pass(names, cases=6)


@pytest.mark.parametrize("names", interpreter.processes(SAME), ids=" ".join)
def test_one_case_of_other_modules(names: list[str]) -> None:
    _pass(names, cases=1)


def test_traffic() -> None:
    """No kernel moves more than its case allows."""
    code, output = interpreter.run(interpreter.TRAFFIC)
    assert code == 0, output[-4000:]
    rows = json.loads(output.splitlines()[-1])
    assert rows
    assert [(case, row) for case, row in rows.items() if not 1 <= row["ratio"] <= row["allowed"]] == []


def test_what_failed_or_has_changed_runs_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    record.touch()
    every = interpreter.modules()
    monkeypatch.setattr(interpreter, "RECORD", record)
    assert interpreter.changed() == every
    monkeypatch.setattr(interpreter, "run", lambda name: (int(name == every[1]), ""))
    assert interpreter.write() == 1
    assert interpreter.changed() == [every[1]]
    digest = interpreter.digest
    monkeypatch.setattr(interpreter, "digest", lambda name: "other" if name == every[0] else digest(name))
    assert interpreter.changed() == every[:2]
