"""Pure PyTorch: what is right.

Every op in a few readable, differentiable lines, complete in its options. Tests and benchmarks compare with these
(in fp64), higher derivatives of the kernels run through them, and they serve what no kernel serves.

Its names are the functions of its files: as a backend it is a namespace like ``llmkern.native``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any


def _functions() -> dict[str, Any]:
    found = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                found[name] = value
    return found


# After all imports, each of which gives a module the name that its function has here.
globals().update(_functions())
