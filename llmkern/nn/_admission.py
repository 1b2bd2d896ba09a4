"""Lets the compiler trace our recurrent layers, which are torch's by class.

The compiler refuses every instance of ``torch.nn.RNN``, ``LSTM`` and ``GRU``: their kernels cannot be traced. Ours can,
but they are instances too. Its setting ``allow_rnn`` would admit them all, torch's included, which would then be
unrolled step by step; so it is set for a module of ours alone, while the compiler looks at that module.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from .._when_loaded import when_loaded

_BUILDER = "torch._dynamo.variables.builder"


def admit(ours: type) -> None:
    """Admits instances of ``ours``: now, if the compiler is loaded, else when it is. Loading it takes seconds."""
    when_loaded(_BUILDER, lambda module: _patch(module, ours))


def _patch(builder: ModuleType, ours: type) -> None:
    variables: Any = getattr(builder, "VariableBuilder", None)
    config: Any = getattr(builder, "config", None)
    wrap = getattr(variables, "wrap_module", None)
    if wrap is None or not hasattr(config, "allow_rnn"):
        # Another version of the compiler, with another rule.
        return

    @wraps(wrap)
    def wrap_module(self: Any, value: Any) -> Any:
        # Not `isinstance`, which takes torch's for ours.
        if ours not in type(value).__mro__:
            return wrap(self, value)
        with config.patch(allow_rnn=True):
            return wrap(self, value)

    variables.wrap_module = wrap_module
