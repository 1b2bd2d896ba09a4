"""Fixtures that every test has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from checks import INTERPRETING
from interpreter import interpreters

import llmkern
from llmkern import dispatch

# The native library's own large blocks; read when it first takes one.
os.environ.setdefault("LLMKERN_POISON", "1")


@pytest.fixture(autouse=True)
def _repeatable_and_poisoned() -> Iterator[None]:
    """A fixed seed, and `torch.empty` filled with NaN: an element that a kernel forgets to write shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under Triton's interpreter only what runs a kernel is of interest: the tests of the ``backend`` fixture and those
    marked ``kernels``; not those marked ``not_interpreted``."""
    if not INTERPRETING:
        for item in items:
            if "[triton" in item.name or "-triton" in item.name:
                item.add_marker("gpu")
        # What waits for other processes comes last.
        items.sort(key=lambda item: item.path.name == "test_interpreter.py")
        return
    runs = [
        item
        for item in items
        if ("backend" in getattr(item, "fixturenames", ()) or "kernels" in item.keywords)
        and "not_interpreted" not in item.keywords
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in runs])
    items[:] = runs


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or INTERPRETING or find_spec("triton") is None:
        return
    waiting = [item for item in session.items if item.path.name == "test_interpreter.py"]
    interpreters.start([item.callspec.params["name"] for item in waiting])


def pytest_sessionfinish() -> None:
    interpreters.stop()


@pytest.fixture(params=["triton"] if INTERPRETING else ["native", "triton", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per backend that this machine has. LLMKERN_TEST_REQUIRE=native,... turns a skip into a
    failure, so that a missing build cannot pass for a green run. A module whose ``OP`` names an op is spared the
    backends that have no kernel for it."""
    name = request.param
    if (reason := dispatch.unavailable(name)) is not None:
        if name in os.environ.get("LLMKERN_TEST_REQUIRE", "").split(","):
            pytest.fail(f"{name}: {reason}")
        pytest.skip(f"{name}: {reason}")
    op = getattr(request.module, "OP", None)
    if op is not None and name not in ("torch", "reference", *dispatch.TABLE[op]):
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
