"""``RNNCell``, ``LSTMCell`` and ``GRUCell``: torch's modules over ``llmkern.functional``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn
from torch import Tensor

from .. import dispatch
from .. import functional as F
from ..functional.rnn import step
from ._deploy import Deployable


class _Cell(torch.nn.RNNCellBase, Deployable):
    """One step: checks of torch's class, then ``llmkern.functional``."""

    _pair = False

    @property
    def _function(self) -> str:
        raise NotImplementedError

    def _forward(self, input: Any, hx: Any) -> Any:
        if hx is None:
            states: tuple[Any, ...] = ()
        elif self._pair:
            states = tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else (None,)
        else:
            states = (hx,)
        short = len(states) and not torch.compiler.is_compiling()
        if short and (result := self._step(input, states)) is not None:
            return result if self._pair else result[0]
        if dispatch.exporter() is not None and (forward := self._torch_forward()) and dispatch.exported(self._function):
            return forward(self, input, hx)
        tensors = (input, *states)
        if not all(isinstance(t, Tensor) and t.dim() == tensors[0].dim() and 0 < t.dim() < 3 for t in tensors):
            # torch's own, for its error.
            return super().forward(input, hx)
        batched = input.dim() == 2
        if not batched:
            input, states = input.unsqueeze(0), tuple(state.unsqueeze(0) for state in states)
        if not states:
            zeros = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
            states = (zeros, zeros)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        out = getattr(F, self._function)(input, states if self._pair else states[0], *weights)
        if batched:
            return out
        return (out[0].squeeze(0), out[1].squeeze(0)) if self._pair else out.squeeze(0)

    def _step(self, input: Any, states: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """A step that may take the short way."""
        weight_ih, weight_hh, *biases = map(self._parameters.get, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        if weight_ih is None or weight_hh is None or type(input) is not Tensor:
            return None
        if (self.bias and (biases[0] is None or biases[1] is None)) or not 0 < input.dim() < 3:
            return None
        if not (isinstance(states[0], Tensor) and isinstance(states[-1], Tensor)):
            return None
        if input.shape[:-1] != states[0].shape[:-1]:
            return None
        return step(self._function.removesuffix("_cell"), input, states, weight_ih, weight_hh, *biases)


class RNNCell(_Cell, torch.nn.RNNCell):
    """One step of an Elman network; see :class:`torch.nn.RNNCell`."""

    @property
    def _function(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}_cell"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._forward(input, hx)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One step of an LSTM; see :class:`torch.nn.LSTMCell`."""

    _pair = True
    _function = "lstm_cell"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return self._forward(input, hx)


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a GRU; see :class:`torch.nn.GRUCell`."""

    _function = "gru_cell"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._forward(input, hx)
