"""The native module, on the process's one OpenMP runtime.

``_native`` and ``_C_cpu`` are compiled for OpenMP and not linked to it: their ``GOMP_*`` symbols are resolved
by the libgomp that is loaded and global. With torch that is torch's own. Without, one is made global before
``_native`` is imported: torch's copy if torch is installed, so that a later ``import torch`` shares it. Two
runtimes would be two thread pools, fighting for the cores.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_SYSTEM = ("libgomp.so.1", "libomp.so", "libomp.dylib")


def _is_global() -> bool:
    return hasattr(ctypes.CDLL(None), "GOMP_parallel")


def _of_torch() -> Iterator[str]:
    """torch's libgomp, where torch is installed; torch is not imported."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from map(str, sorted((Path(folder) / "lib").glob("libgomp*.so*")))


def load_openmp() -> None:
    """Makes an OpenMP runtime global, unless one is.

    Raises:
        ImportError: if there is none on this machine.
    """
    errors: list[str] = []
    for name in () if _is_global() else (*_of_torch(), *_SYSTEM):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            errors.append(str(error))
        if _is_global():
            break
    if not _is_global():
        raise ImportError(
            "llmkern's native code needs an OpenMP runtime, and none was found; install one (Debian: apt-get"
            f" install libgomp1) or torch, which brings its own. Tried: {'; '.join(errors)}"
        )


def load_native() -> ModuleType:
    """The module ``llmkern._native``.

    Raises:
        ImportError: if it was not built or does not load, with the reason.
    """
    load_openmp()
    try:
        return importlib.import_module("llmkern._native")
    except ImportError as error:
        raise ImportError(
            f"llmkern's native module does not load ({error}); `python -m llmkern info` says what was built"
        ) from error
