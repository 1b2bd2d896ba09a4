"""The Triton backend: the same function names, arguments and returns as ``llmkern.native``, on GPU tensors.

Pure: tensors in, tensors out. The modules here import without a GPU; only launching a kernel needs one, or Triton's
interpreter (``TRITON_INTERPRET=1``, set before the first import), which runs kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why this backend cannot run here, or ``None`` if it can. Triton, which takes a second, is imported last."""
    if not interpreting():
        if not torch.cuda.is_available():
            return "no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        capability = torch.cuda.get_device_capability()
        if torch.version.hip is None and capability < (8, 0):
            return f"needs a GPU of compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


def synchronize(device: torch.device | int | None = None) -> None:
    """Waits for a GPU, and raises what its kernels have found; see ``_faults``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
    importlib.import_module("._faults", __name__).raise_any()


@cache
def _homes() -> dict[str, str]:
    """The file of each function. They are read, not imported: that takes seconds, and a call needs one of them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    functions = re.compile(r"^def ([a-z]\w*)\(", re.MULTILINE)
    return {name: file.stem for file in files for name in functions.findall(file.read_text())}


def __getattr__(name: str) -> Any:
    home = _homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{home}", __name__)
    # All of the file's: a function may have the name of its file, which the import has put into this namespace.
    globals().update({function: vars(module)[function] for function, file in _homes().items() if file == home})
    return globals()[name]
