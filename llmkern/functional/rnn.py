"""Recurrent networks of several layers and directions, with the signatures that torch's modules call.

Each of ``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` is called in one of two ways, as ``torch._VF``'s:

    lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

Args:
    input: (T, B, I), or (B, T, I) with ``batch_first``.
    data, batch_sizes: a PackedSequence's (total, I) and (T).
    hx: the first state (layers * directions, B, H); for ``lstm`` a pair (h, c), h of width P with projections.
    params: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] of every layer and direction, in torch's order. They
        need not lie in one buffer.
    dropout: probability of zeroing an element between two layers, if ``train``.

Returns:
    (output, h_n), for ``lstm`` (output, h_n, c_n), shaped as torch shapes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from .. import dispatch, ops

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass
class _Call:
    """A call of either form, with the states as a tuple."""

    mode: str
    input: Tensor
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False

    @classmethod
    def parse(cls, mode: str, args: tuple[Any, ...]) -> _Call:
        packed = isinstance(args[3], (list, tuple))
        input, *rest = args
        batch_sizes = rest.pop(0) if packed else None
        hx, *rest = rest
        return cls(mode, input, batch_sizes, tuple(hx) if mode == "lstm" else (hx,), *rest)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def per_layer(self) -> int:
        """Tensors in ``params`` for one layer and direction."""
        return len(self.params) // (self.num_layers * self.directions)

    @property
    def projected(self) -> bool:
        return self.per_layer == (5 if self.has_biases else 3)

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of layer and direction ``index``."""
        chunk = [p.contiguous() for p in self.params[index * self.per_layer : (index + 1) * self.per_layer]]
        weight_hr = chunk.pop() if self.projected else None
        bias_ih, bias_hh = chunk[2:] if self.has_biases else (None, None)
        return chunk[0], chunk[1], bias_ih, bias_hh, weight_hr

    def well_formed(self) -> bool:
        """Whether torch would accept the call; if not, torch gets it, for its error."""
        x, packed = self.input, self.batch_sizes is not None
        expected = (4 if self.has_biases else 2) + (len(self.states) == 2 and self.per_layer in (3, 5))
        if x.dim() != (2 if packed else 3) or not x.numel() or self.per_layer != expected:
            return False
        if any(h.dim() != 3 for h in self.states) or len(self.states) != (2 if self.mode == "lstm" else 1):
            return False
        B = int(self.batch_sizes[0]) if self.batch_sizes is not None else x.shape[0 if self.batch_first else 1]
        H = self.states[-1].shape[2]
        outer, out = (self.num_layers * self.directions, B), self.states[0].shape[2]
        if not H or any(h.shape[:2] != outer for h in self.states) or (out != H and not self.projected):
            return False
        rows = _GATES[self.mode] * H
        for index in range(outer[0]):
            weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = self.layer(index)
            width = x.shape[-1] if index < self.directions else out * self.directions
            shapes = [(weight_ih, (rows, width)), (weight_hh, (rows, out)), (bias_ih, (rows,)), (bias_hh, (rows,))]
            shapes.append((weight_hr, (out, H)))
            if any(t is not None and tuple(t.shape) != shape for t, shape in shapes):
                return False
        return True

    def options(self) -> list[str]:
        used = {
            "packed sequences": self.batch_sizes is not None,
            "proj_size": self.projected,
            "autocast": torch.is_autocast_enabled(self.input.device.type),
        }
        return [name for name, on in used.items() if on]


def _run(call: _Call, backend: str) -> tuple[Tensor, ...]:
    x = call.input.transpose(0, 1) if call.batch_first else call.input
    finals: list[tuple[Tensor, Tensor]] = []
    for layer in range(call.num_layers):
        outputs = []
        for direction in range(call.directions):
            index = layer * call.directions + direction
            hx = call.states[0][index].contiguous()
            cx = call.states[1][index].contiguous() if call.mode == "lstm" else None
            weights = call.layer(index)
            y, *final = ops.rnn(x.contiguous(), hx, cx, *weights, call.batch_sizes, call.mode, direction == 1, backend)
            outputs.append(y)
            finals.append((final[0], final[1]))
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if call.dropout and call.train and layer < call.num_layers - 1:
            x = drop(x, call.dropout)
    states = [torch.stack(column) for column in zip(*finals, strict=True)]
    output = x.transpose(0, 1) if call.batch_first else x
    return (output, *states) if call.mode == "lstm" else (output, states[0])


def _recurrent(mode: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    call = _Call.parse(mode, args)
    backend = "torch"
    if call.well_formed():
        T = call.input.shape[1 if call.batch_first else 0]
        B, H = call.states[0].shape[1], call.states[-1].shape[2]
        backend = dispatch.pick(mode, call.input, *call.states, *call.params, options=call.options(), T=T, B=B, H=H)
    if backend == "torch":
        return getattr(torch._VF, mode)(*args)
    return _run(call, backend)


def lstm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory; see this module for arguments and results, :class:`torch.nn.LSTM` for the formula."""
    return _recurrent("lstm", args)  # type: ignore[return-value]


def gru(*args: Any) -> tuple[Tensor, Tensor]:
    """Gated recurrent units; see this module for arguments and results, :class:`torch.nn.GRU` for the formula."""
    return _recurrent("gru", args)  # type: ignore[return-value]


def rnn_tanh(*args: Any) -> tuple[Tensor, Tensor]:
    """An Elman network with tanh; see this module for arguments and results, :class:`torch.nn.RNN` for the formula."""
    return _recurrent("rnn_tanh", args)  # type: ignore[return-value]


def rnn_relu(*args: Any) -> tuple[Tensor, Tensor]:
    """An Elman network with relu; see this module for arguments and results, :class:`torch.nn.RNN` for the formula."""
    return _recurrent("rnn_relu", args)  # type: ignore[return-value]


def _cell(mode: str, input: Tensor, hx: Any, *weights: Tensor | None) -> Any:
    name = f"{mode}_cell"
    backend = dispatch.pick(name, input, options=["autocast"] if torch.is_autocast_enabled(input.device.type) else [])
    if backend == "torch":
        return getattr(torch._VF, name)(input, hx, *weights)
    h, c = hx if mode == "lstm" else (hx, None)
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    assert weight_ih is not None
    assert weight_hh is not None
    y, _, cy = ops.rnn(
        input.unsqueeze(0), h, c, weight_ih, weight_hh, bias_ih, bias_hh, None, None, mode, False, backend
    )
    return (y[0], cy) if mode == "lstm" else y[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: (h', c'), each (B, H), from ``input`` (B, I) and ``hx`` = (h, c), each (B, H)."""
    return _cell("lstm", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU: h' (B, H) from ``input`` (B, I) and ``hx`` (B, H)."""
    return _cell("gru", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of an Elman network with tanh: h' (B, H) from ``input`` (B, I) and ``hx`` (B, H)."""
    return _cell("rnn_tanh", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of an Elman network with relu: h' (B, H) from ``input`` (B, I) and ``hx`` (B, H)."""
    return _cell("rnn_relu", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
