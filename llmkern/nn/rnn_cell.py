"""``RNNCell``, ``LSTMCell`` and ``GRUCell``: torch's modules over ``llmkern.functional``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn
from torch import Tensor

from .. import functional as F
from .._torch_tree import Replaces
from ..functional.rnn import step


class _Cell(torch.nn.RNNCellBase, Replaces):
    """One step: checks of torch's class, then ``llmkern.functional``."""

    _states: tuple[str, ...] = ("hidden",)

    @property
    def _function(self) -> str:
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if hx is not None and not torch.compiler.is_compiling():
            pair = isinstance(hx, (tuple, list))
            if pair == (len(self._states) == 2) and (result := self._step(input, tuple(hx) if pair else (hx,))):
                return result if pair else result[0]
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        pair = len(self._states) == 2
        states = None if hx is None else tuple(hx) if pair else (hx,)
        for label, state in zip(self._states, states or (), strict=False):
            if state.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected {label} to be 1D or 2D, got {state.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            states = states and tuple(state.unsqueeze(0) for state in states)
        if states is None:
            zeros = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
            states = (zeros, zeros) if pair else (zeros,)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        out = getattr(F, self._function)(input, states if pair else states[0], *weights)
        if batched:
            return out
        return (out[0].squeeze(0), out[1].squeeze(0)) if pair else out.squeeze(0)

    def _step(self, input: Any, states: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """A step that may take the short way."""
        weight_ih, weight_hh, *biases = map(self._parameters.get, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        if weight_ih is None or weight_hh is None or type(input) is not Tensor:
            return None
        if (self.bias and any(b is None for b in biases)) or not 0 < input.dim() < 3:
            return None
        if input.shape[:-1] != states[0].shape[:-1]:
            return None
        return step(self._function.removesuffix("_cell"), input, states, weight_ih, weight_hh, *biases)


class RNNCell(_Cell):
    """One step of an Elman network; see :class:`torch.nn.RNNCell`."""

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    @property
    def _function(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}_cell"


class LSTMCell(_Cell):
    """One step of an LSTM; see :class:`torch.nn.LSTMCell`."""

    _states = ("hx[0]", "hx[1]")
    _function = "lstm_cell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)


class GRUCell(_Cell):
    """One step of a GRU; see :class:`torch.nn.GRUCell`."""

    _function = "gru_cell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
