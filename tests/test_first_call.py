"""The first call of a process, which finds no backend loaded: compiled in one graph, exported, transformed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import first_call
import pytest

import llmkern.functional
import llmkern.nn


@pytest.fixture(scope="module")
def troubles() -> dict[str, str | None]:
    """What went wrong in each case, or None."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMKERN_BACKEND")}
    script = Path(__file__).with_name("first_call.py")
    done = subprocess.run(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=True, env=environment, timeout=300
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_every_public_class_and_function_is_tried() -> None:
    classes = {n for n in llmkern.nn.__all__ if isinstance(getattr(llmkern.nn, n), type)}
    functions = {n for n in llmkern.functional.__all__ if not isinstance(getattr(llmkern.functional, n), type)}
    assert classes == set(first_call.MODULES)
    assert functions == set(first_call.FUNCTIONS)


@pytest.mark.parametrize("name", first_call.CASES)
def test_the_first_call_gives_what_later_calls_give(name: str, troubles: dict[str, str | None]) -> None:
    assert name in troubles, "the process ended without a word"
    assert troubles[name] is None, troubles[name]
