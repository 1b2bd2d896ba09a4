"""Fixtures that every test has."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from checks import INTERPRETING

import llmkern
import llmkern.ops
from llmkern import dispatch

# The native library's own large blocks; read when it first takes one.
os.environ.setdefault("LLMKERN_POISON", "1")

# Names of tests show tensors that are drawn when a module is collected: workers of pytest-xdist must agree on them.
torch.manual_seed(0)

# Backends that must be here, native,...: so that a missing build cannot pass for a green run.
REQUIRED = os.environ.get("LLMKERN_TEST_REQUIRE", "").split(",")
BACKENDS = [
    name
    for name in (["triton"] if INTERPRETING else ["native", "triton", "torch", "reference"])
    if name in REQUIRED or dispatch.unavailable(name) is None
]


@pytest.fixture(autouse=True)
def _repeatable_and_poisoned() -> Iterator[None]:
    """A fixed seed, and `torch.empty` filled with NaN: an element that a kernel forgets to write shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what cannot run here: without a GPU what needs one; under Triton's interpreter all that runs no
    kernel, and what is marked ``not_interpreted``."""

    def runs(item: pytest.Item) -> bool:
        if INTERPRETING:
            has_kernel = "backend" in getattr(item, "fixturenames", ()) or "kernels" in item.keywords
            return has_kernel and "not_interpreted" not in item.keywords
        if "[triton" in item.name or "-triton" in item.name:
            item.add_marker("gpu")
        empty = any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skip"))
        return not empty and ("gpu" not in item.keywords or torch.cuda.is_available())

    kept = [item for item in items if runs(item)]
    if most := int(os.environ.get("LLMKERN_TEST_CASES", "0")):
        kept = thinned(kept, most)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    # The longest first, so that none is left when all others have ended.
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")


def thinned(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most so many of a test's cases, drawn at random but always the same: the interpreter takes a hundred times as
    long as a kernel, and native code goes through all of them."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    drawn = {case for name, all_ in cases.items() for case in random.Random(name).sample(all_, min(most, len(all_)))}
    return [item for item in items if item in drawn]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per backend that this machine has. A module whose ``OP`` names an op is spared the backends that
    have no kernel for it."""
    name = request.param
    if (reason := dispatch.unavailable(name)) is not None:
        pytest.fail(f"{name}: {reason}")
    op = getattr(request.module, "OP", None)
    if op is not None and name in ("native", "triton") and name not in dispatch.TABLE[op]:
        pytest.skip(f"{name}: no kernel for this op yet")
    # On a GPU machine tests that say nothing of a device make their tensors there.
    on_gpu = name == "triton" and not INTERPRETING
    with llmkern.backend(name), torch.device("cuda") if on_gpu else nullcontext():
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """CUDA for tests marked `gpu` or on the triton backend outside the interpreter, else the CPU."""
    on_gpu = "gpu" in request.keywords
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        on_gpu = on_gpu or os.environ.get("TRITON_INTERPRET") != "1"
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda" if on_gpu else "cpu")
