"""Those who make a graph of a call: the compiler, which runs it here, and exporters, which take it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.compiler as _compiler
from torch._C import _is_tracing

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_while_compiling(function: _Function) -> _Function:
    """``function``, whose answers never change: a compiler that traces a call of it makes the call, and takes the
    answer."""
    # torch.compiler.assume_constant_result does this, and loads the compiler to do so.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_compiling
def exporter() -> str | None:
    """What makes a graph of the call that is being made to run elsewhere, where llmkern may not be: ``torch.jit.trace``
    or ``torch.export``, with which ONNX is written too; mostly nothing."""
    if _is_tracing():
        return "torch.jit.trace"
    # Not is_exporting(), which the compilers of older versions take to be true of all they compile.
    return "torch.export" if _compiler._is_exporting_flag else None
