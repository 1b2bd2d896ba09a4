"""The Triton backend: the same function names, arguments and returns as ``llmkern.native``, on GPU tensors.

Pure: tensors in, tensors out. The modules here import without a GPU; only launching a kernel needs one, or Triton's
interpreter (``TRITON_INTERPRET=1``, set before the first import), which runs kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

# Where each function of the namespace lives; a module is imported, and Triton with it, when it is first needed.
_MODULES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("cross_entropy_forward", "cross_entropy_forward_", "cross_entropy_backward"),
    "linear_cross_entropy": ("linear_cross_entropy_forward", "linear_cross_entropy_backward"),
    "dropout": ("dropout_forward",),
    "embedding": ("embedding_forward", "embedding_backward", "embedding_sparse_backward", "embedding_renorm_"),
    "embedding_bag": (
        "embedding_bag_forward",
        "embedding_bag_max_forward",
        "embedding_bag_backward",
        "embedding_bag_sparse_backward",
        "embedding_bag_samples_backward",
    ),
    "fused_embedding": ("fused_embedding_forward", "fused_embedding_backward"),
    "grad_norm": ("grad_norm", "scale_"),
    "linear": ("linear_forward", "linear_backward"),
    "mse_loss": ("mse_loss_forward", "mse_loss_backward", "mse_loss_correct_"),
    "quantized_embedding": ("quantized_embedding_forward", "quantized_embedding_quantize"),
    "optim": ("advance", "adam_step", "sgd_step", "adagrad_step"),
    "row_optim": ("row_lookup", "row_catch_up", "row_step"),
    "sparse_optim": (
        *("sparse_sgd_step", "sparse_adagrad_step", "sparse_adam_step", "rowwise_adagrad_step", "sparse_grad_norm"),
    ),
    "rnn": ("rnn_forward",),
    "_rnn_backward": ("rnn_backward",),
}


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


_HOME = {function: module for module, functions in _MODULES.items() for function in functions}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    # All of the module's: a function may have the name of its module, which the import has put into this namespace.
    globals().update({function: getattr(module, function) for function in _MODULES[_HOME[name]]})
    return globals()[name]
