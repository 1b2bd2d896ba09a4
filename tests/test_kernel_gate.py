"""Every Triton kernel, compiled for every GPU that it is meant for: nothing spills, budgets hold."""

from __future__ import annotations

import pytest
from checks import INTERPRETING

from llmkern import dispatch

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif("Triton" in (dispatch.unavailable("triton") or ""), reason="no Triton"),
]


def test_no_spill_and_within_budget() -> None:
    import kernel_gate

    assert kernel_gate.faults(kernel_gate.measure_all(), kernel_gate.read_budgets()) == []
