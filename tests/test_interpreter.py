"""The Triton kernels on the CPU: the tests of every op again under the interpreter, and the bytes that kernels move."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from checks import INTERPRETING
from interpreter import TRAFFIC, interpreters, modules

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="this is the interpreter"),
    pytest.mark.skipif(find_spec("triton") is None, reason="no Triton"),
]


@pytest.mark.parametrize("name", modules())
def test_module(name: str) -> None:
    code, output = interpreters.result(name)
    # 5: every test of the module is for other backends.
    assert code in (0, 5), output[-8000:]


@pytest.mark.parametrize("name", [TRAFFIC])
def test_traffic(name: str) -> None:
    """No kernel moves more than its case allows."""
    code, output = interpreters.result(name)
    assert code == 0, output[-4000:]
    rows = json.loads(output.splitlines()[-1])
    assert rows
    assert [(case, row) for case, row in rows.items() if not 1 <= row["ratio"] <= row["allowed"]] == []
