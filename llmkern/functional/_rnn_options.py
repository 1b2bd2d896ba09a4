"""What torch's recurrent layers do not have: the options, and which values they take."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import RNNOptions


@dataclass(frozen=True)
class Extras:
    """See :class:`llmkern.nn.LSTM`. Defaults are neutral."""

    peepholes: Sequence[Tensor] = ()
    norms: Sequence[Sequence[Tensor]] = ()
    forget_bias: float = 0.0
    clip: float = 0.0
    zoneout: float = 0.0
    zoneout_cell: float = 0.0
    weight_dropout: float = 0.0
    variational_dropout: bool = False
    return_cell_states: bool = False
    checkpoint_chunks: int = 1
    state_dtype: torch.dtype | None = None

    @classmethod
    def of_a_module(cls) -> dict[str, Any]:
        """The options that a module has too, with their neutral values: the others it makes of its parameters, or, with
        ``zoneout``, of a pair."""
        return {f.name: f.default for f in fields(cls) if f.name not in ("peepholes", "norms", "zoneout_cell")}

    @classmethod
    def of(cls, options: dict[str, Any]) -> Extras:
        """From keywords of a call, whose values are looked at."""
        return cls(**{name: checked_option(name, value) for name, value in options.items()})

    def tensors(self) -> list[Tensor]:
        return [*self.peepholes, *(norm for norms in self.norms for norm in norms)]

    def to(self, dtype: torch.dtype) -> Extras:
        norms = [[norm.to(dtype) for norm in norms] for norms in self.norms]
        return replace(self, peepholes=[p.to(dtype) for p in self.peepholes], norms=norms)

    def of_an_op(self) -> dict[str, Any]:
        """The options that are the op's; what the others do is done around it."""
        return {name: getattr(self, name) for name in _OF_AN_OP}

    def used(self) -> list[str]:
        """Without ``state_dtype``, of which the states tell."""
        used = [f.name for f in fields(self) if getattr(self, f.name) not in (f.default, [])]
        return [name for name in used if name != "state_dtype"]


# The compiler knows no test for a field inside of a trace.
_OF_AN_OP = [f.name for f in fields(Extras) if f.name in RNNOptions._fields]
_FLAGS = ("variational_dropout", "return_cell_states", "peephole", "layer_norm")
_COUNTS = ("num_heads", "checkpoint_chunks")
_PROBABILITIES = ("zoneout", "zoneout_cell", "weight_dropout")
_STATES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked_option(name: str, value: Any) -> Any:
    """``value``, as Python's number where it is another library's.

    Raises:
        ValueError: if option ``name`` takes no such value.
    """
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, expected True or False")
    elif name in _COUNTS:
        number = _number(value, int, numbers.Integral)
        if number is None or number < 1:
            raise ValueError(f"{name}: got {value!r}, expected at least 1, an integer")
        return number
    elif name in _PROBABILITIES:
        number = _number(value, float, numbers.Real)
        if number is None or not 0 <= number <= 1:
            more = ", or of an LSTM a tuple of two, for h and for c" if name == "zoneout" else ""
            raise ValueError(f"{name}: got {value!r}, expected a number between 0 and 1{more}")
        return number
    elif name == "clip":
        number = _number(value, float, numbers.Real)
        if number is None or not number >= 0:
            raise ValueError(f"clip: got {value!r}, expected a bound > 0, or 0 for none")
        return number
    elif name == "forget_bias":
        number = _number(value, float, numbers.Real)
        if number is None or not math.isfinite(number):
            raise ValueError(f"forget_bias: got {value!r}, expected a finite number")
        return number
    elif name == "state_dtype" and value is not None and value not in _STATES:
        expected = ", ".join(map(str, _STATES))
        raise ValueError(f"state_dtype: got {value!r}, expected one of {expected}, or None for the input's")
    return value


def _number(value: Any, kind: type, numeric: type) -> Any:
    """As an int or a float; None if it is no such number. A bool is none."""
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    return kind(value) if isinstance(value, numeric) and not isinstance(value, bool) else None
