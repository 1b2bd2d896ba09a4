"""torch's protocol for functions: a subclass with ``__torch_function__``, or a ``TorchFunctionMode``, is asked."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import has_torch_function_variadic
from torch.utils._device import DeviceContext

from .. import dispatch


def overridden(op: str, *arguments: Any) -> bool:
    """Whether somebody is asked before a call on these arguments. The caller then hands the call, as it was written, to
    torch's function, which asks them under its own name; what torch does not have, to ``handle_torch_function``.

    A default device is a mode too. It has nothing to say about functions that take tensors: it is not asked, or
    setting one would switch every kernel off. Nor are those of torch.export: torch's functions ask them, if they serve.
    """
    if not has_torch_function_variadic(*arguments) or _no_override(arguments):
        return False
    dispatch.note(op, "torch", "a __torch_function__ of an argument, or a TorchFunctionMode, is asked")
    return True


def _no_override(arguments: tuple[Any, ...]) -> bool:
    if not torch._C._is_torch_function_mode_enabled() or torch.compiler.is_dynamo_compiling():
        return False
    for mode in map(type, torch.overrides._get_current_function_mode_stack()):
        if mode is not DeviceContext and not mode.__module__.startswith(("torch._export.", "torch.fx.")):
            return False
    kinds = {type(argument) for argument in arguments} - {torch.Tensor, torch.nn.Parameter}
    silent = (None, torch._C._disabled_torch_function_impl)
    return all(getattr(kind, "__torch_function__", None) in silent for kind in kinds)
