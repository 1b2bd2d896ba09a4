"""Every Triton kernel, compiled for every GPU that it is meant for: nothing spills, budgets hold."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from checks import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(find_spec("triton") is None, reason="no Triton"),
]


def test_no_spill_and_within_budget() -> None:
    import kernel_gate

    units = kernel_gate.every_unit()
    assert kernel_gate.unused(units) == [], "python tests/kernel_gate.py --write"
    assert kernel_gate.faults(kernel_gate.measure_all(kernel_gate.changed(units))) == []


def test_what_has_changed_since_its_budget_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_gate

    same, other = kernel_gate.every_unit()[:2]
    budgets = {made.name: {"source": made.digest()} for made in (same, other)}
    monkeypatch.setattr(kernel_gate, "read_budgets", lambda: (kernel_gate.VERSION, budgets))
    edited = other._replace(options={**other.options, "num_warps": 2 * other.options["num_warps"]})
    new = other._replace(name="new")
    assert kernel_gate.changed([same, edited, new]) == [edited, new]
    monkeypatch.setattr(kernel_gate, "read_budgets", lambda: ("Triton 0.0", budgets))
    assert kernel_gate.changed([same, other]) == [same, other]


# What changes from call to call: the batch, the time, the numbers of an optimizer's step.
CHANGES = {"N": 1, "B": 1, "T": 1, "step": 1, "lr": 0.125}


def test_nothing_is_compiled_again_for_another_batch() -> None:
    import kernel_gate

    for name, case in kernel_gate.every_case().items():
        changes = case.again or {key: case.sizes[key] + by for key, by in CHANGES.items() if key in case.sizes}
        first, second = (
            {unit.specialisation() for unit in kernel_gate.units_of(case, **sizes)} for sizes in ({}, changes)
        )
        assert second <= first, name
