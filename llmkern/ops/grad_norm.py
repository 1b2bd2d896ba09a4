"""``llmkern::grad_norm`` and ``llmkern::scale_``: what gradient clipping reads and writes. They have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define

grad_norm = define(
    "grad_norm(Tensor[] tensors) -> Tensor",
    lambda tensors: tensors[0].new_empty((), dtype=torch.float64),
)

_scale = define("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()", lambda *args: None)


def may_change(factor: Tensor) -> bool:
    """Whether multiplying by ``factor`` may change anything. The host knows its own numbers; nobody waits for one on a
    GPU, whose kernel looks, and leaves a 1 be, or while a graph is made."""
    return torch.compiler.is_compiling() or factor.device.type != "cpu" or bool(factor != 1)


def scale_(tensors: list[Tensor], factor: Tensor, backend: str) -> None:
    """Each tensor times ``factor``, a float64 scalar beside them, in place. Call it without grad."""
    _scale(tensors, factor, backend)
    if torch.compiler.is_compiling():
        return
    # A kernel writes behind autograd's back: a graph that still needs the old values must notice.
    torch.autograd.graph.increment_version(tensors)
