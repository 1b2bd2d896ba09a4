"""The native CPU backend: the op library ``_C_cpu``, under the backend function names.

The functions here are the ops of ``csrc/torch`` as they are: tensors in, tensors out, no autograd, no checks beyond
what memory safety needs. They appear when the library loads; :func:`unavailable` says why it did not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_LIBRARY = _HERE / "_C_cpu.so"


def build_info() -> dict[str, Any]:
    """What ``setup.py`` built and what it skipped, with reasons; empty if the package was never built."""
    path = _HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load() -> str | None:
    if hasattr(torch.ops.llmkern_cpu, "empty_cache"):
        # A process has one library, whoever imports llmkern again, and from wherever.
        return None
    if not _LIBRARY.exists():
        return build_info().get("missing", {}).get("_C_cpu", "the op library was not built")
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the op library does not load: {error}"
    return None


_reason = _load()


def unavailable() -> str | None:
    """Why this backend cannot run here, or ``None`` if it can.

    Raises:
        ValueError: for an environment variable whose value means nothing, before anything reads it.
    """
    if _reason is None:
        torch.ops.llmkern_cpu.check_settings()
    return _reason


def empty_cache() -> None:
    """Gives the memory that the native kernels keep for their next call back to the system.

    Large results and scratch (1 MiB and more) are kept when they are freed, at most ``LLMKERN_CACHE_MB`` MiB: fresh
    pages would cost more than the kernels that fill them.
    """
    if _reason is None:
        torch.ops.llmkern_cpu.empty_cache()


def __getattr__(name: str) -> Any:
    if name.startswith("_") or _reason is not None or not hasattr(torch.ops.llmkern_cpu, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(torch.ops.llmkern_cpu, name).default
    return function
