"""The Triton kernels on the CPU: the tests of every op again under the interpreter, and the bytes that kernels move."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from checks import INTERPRETING
from interpreter import TRAFFIC, processes, run

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="this is the interpreter"),
    pytest.mark.skipif(find_spec("triton") is None, reason="no Triton"),
]


@pytest.mark.parametrize("names", processes(), ids=" ".join)
def test_modules(names: list[str]) -> None:
    code, output = run(*names)
    assert code == 0, output[-8000:]


def test_traffic() -> None:
    """No kernel moves more than its case allows."""
    code, output = run(TRAFFIC)
    assert code == 0, output[-4000:]
    rows = json.loads(output.splitlines()[-1])
    assert rows
    assert [(case, row) for case, row in rows.items() if not 1 <= row["ratio"] <= row["allowed"]] == []
