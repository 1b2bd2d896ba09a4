"""Fused kernels for embedding → recurrent → softmax models in PyTorch.

``import llmkern.nn as nn`` is the only change a model needs: the same classes, the same numbers, the same
``state_dict``, faster. ``llmkern.explain(module, *inputs)`` says what ran and why; ``with llmkern.backend(name)``
forces a backend; ``python -m llmkern info`` says what this installation can do.

Submodules load on first use, so that ``llmkern.numpy`` works without torch.
"""

from __future__ import annotations

import importlib
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["backend", "empty_cache", "explain", "functional", "nn", "numpy", "optim", "quantize_embedding", "reference"]
__all__ += ["synchronize"]

if TYPE_CHECKING:
    from . import functional, nn, numpy, optim, reference
    from .dispatch import backend, explain, synchronize
    from .native import empty_cache
    from .nn.quantized_embedding import quantize_embedding

# In a checkout, `llmkern.kernels` and `llmkern.benchmarks` are folders beside this one; an installation maps them.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").exists():
    __path__.append(str(_checkout))

_HOME = {
    "backend": "dispatch",
    "explain": "dispatch",
    "synchronize": "dispatch",
    "empty_cache": "native",
    "quantize_embedding": "nn.quantized_embedding",
}
_SUBMODULES = {"dispatch", "functional", "kernels", "native", "nn", "numpy", "ops", "optim", "reference"}


def _submodule(path: str) -> Any:
    # This copy's own: `sys.modules` has another's, if llmkern has been imported again since.
    first, *rest = path.split(".")
    module = globals().get(first)
    return reduce(getattr, rest, module) if module else importlib.import_module(f"{__name__}.{path}")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(_submodule(_HOME[name]), name)
    if name in _SUBMODULES:
        return _submodule(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
