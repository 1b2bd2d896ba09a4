"""Calls of the Triton backend: one module per op, with a dictionary ``CASES``.

At full size they are for the compiler, which needs no data (`kernel_gate`); at a small one for the interpreter, which
counts what is read and written (`kernel_traffic`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """``run(device, **sizes)`` makes its arguments on ``device`` and calls functions of ``llmkern.kernels``.

    Attributes:
        sizes: as the benchmarks have them; the device is "meta", so no memory is needed.
        small: for the interpreter; None: what the kernels move is not counted.
        floor: bytes that have to be moved, of sizes; what has to be read once and written once.
        allowed: how many times the floor may be moved.
        again: sizes of another call, for which nothing new may be compiled. Default: N, B, T and the like, one more.
    """

    run: Callable[..., None]
    sizes: dict[str, Any]
    small: dict[str, Any] | None = None
    floor: Callable[..., int] | None = None
    allowed: float = 1.1
    again: dict[str, Any] | None = None


def every_case() -> dict[str, Case]:
    """All cases, named ``<op>: <case>``."""
    cases = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        for name, case in importlib.import_module(f"{__name__}.{module}").CASES.items():
            cases[f"{module}: {name}"] = case
    return cases
