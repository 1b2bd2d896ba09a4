"""Layers and directions of a recurrent network, over ``rnn``, which knows one of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from .._facts import CELLS, GATES
from ..ops.rnn import rnn
from ._rnn_options import Extras
from .dropout import dropout


@dataclass
class RNNCall:
    """A call in either of torch's forms (see ``functional/rnn.py``), with the states as a tuple."""

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
    batch_first: bool
    extras: Extras
    autocast: bool

    @classmethod
    def parse(cls, mode: str, args: tuple[Any, ...], extras: Extras) -> RNNCall:
        input, batch_sizes, hx, *rest = args if isinstance(args[3], (list, tuple)) else (args[0], None, *args[1:])
        states = tuple(hx) if CELLS[mode] else (hx,)
        if extras.state_dtype is not None:
            states = tuple(state.to(extras.state_dtype) for state in states)
        params, biases, layers, dropout, train, bidirectional, *batch_first = rest
        first = bool(batch_first and batch_first[0])
        form = (layers, dropout, train, bidirectional, first, extras, dispatch.autocasts(input))
        return cls(mode, input, batch_sizes, states, params, biases, *form)

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
        chunk = list(self.params[index * self.per_layer : (index + 1) * self.per_layer])
        weight_hr = chunk.pop() if self.projected else None
        bias_ih, bias_hh = chunk[2:] if self.has_biases else (None, None)
        return chunk[0], chunk[1], bias_ih, bias_hh, weight_hr

    def well_formed(self) -> bool:
        """Whether torch would accept the call, or would if it had ``extras``; if not, torch gets it, for its error."""
        x, packed = self.input, self.batch_sizes is not None
        expected = (4 if self.has_biases else 2) + (self.mode == "lstm" and self.per_layer in (3, 5))
        if x.dim() != (2 if packed else 3) or self.per_layer != expected:
            return False
        if not x.shape[1 if self.batch_first else 0]:
            return False
        if not all(isinstance(weight, Tensor) for weight in self.params):
            return False
        if any(h.dim() != 3 for h in self.states) or len(self.states) != (2 if CELLS[self.mode] else 1):
            return False
        B = int(self.batch_sizes[0]) if self.batch_sizes is not None else x.shape[0 if self.batch_first else 1]
        H = self.states[-1].shape[2] // max(CELLS[self.mode], 1)
        outer, out = (self.num_layers * self.directions, B), self.states[0].shape[2]
        if not H or any(h.shape[:2] != outer for h in self.states) or (out != H and not self.projected):
            return False
        rows, columns = GATES[self.mode] * H, out // self.heads
        for index in range(outer[0]):
            weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = self.layer(index)
            width = x.shape[-1] if index < self.directions else out * self.directions
            if weight_ih.shape != (rows, width) or weight_hh.shape != (rows, columns):
                return False
            if any(b is not None and b.shape != (rows,) for b in (bias_ih, bias_hh)):
                return False
            if weight_hr is not None and weight_hr.shape != (out, H):
                return False
        return True

    def cast(self, dtype: torch.dtype) -> RNNCall | None:
        """The call that autocast makes of this one, in bf16, or with options beyond torch's in any narrow dtype;
        ``None`` where only torch knows.

        torch runs all Elman networks in bf16, and LSTMs that oneDNN takes as a whole; its steps of GRUs and of other
        LSTMs round the operands of products only, and keep the dtype of the states.
        """
        torch_serves = dispatch.serves("torch", self.mode, self.options())
        if self.input.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
            return None
        if torch_serves and self.extras.state_dtype is None and (dtype != torch.bfloat16 or self.projected):
            return None
        whole = self.mode == "lstm" and self.batch_sizes is None and dispatch.onednn_takes(self.input.dtype)
        stepwise = self.mode in ("lstm", "gru") and not whole
        if any(t.dtype not in (torch.float32, dtype) for t in (self.input, *self.states, *self.params)):
            return None
        keeps = stepwise or self.extras.state_dtype is not None
        return replace(
            self,
            input=self.input.to(dtype),
            params=[p.to(dtype) for p in self.params],
            states=self.states if keeps else tuple(state.to(dtype) for state in self.states),
            extras=self.extras.to(dtype),
        )

    @property
    def heads(self) -> int:
        """Diagonal blocks of the hidden weights, which then have fewer columns than h; torch knows one only."""
        out, columns = self.states[0].shape[2], self.params[1].shape[-1] if self.params[1].dim() else 0
        whole = columns > 0 and out % columns == 0 and not self.projected
        return out // columns if whole else 1

    @property
    def wide_states(self) -> bool:
        """Whether states are fp32 beside a narrower input."""
        narrow = self.input.dtype in (torch.bfloat16, torch.float16)
        return narrow and all(state.dtype == torch.float32 for state in self.states)

    def options(self) -> list[str]:
        extras = self.extras.used()
        used = {
            "batch_sizes": self.batch_sizes is not None,
            "proj_size": self.projected,
            "num_heads": self.heads > 1,
            # Under autocast torch takes such states too, and says what becomes of them.
            "state_dtype": self.wide_states and (not self.autocast or self.extras.state_dtype is not None),
            "clipped_projection": self.projected and bool({"clip", "zoneout"} & set(extras)),
        }
        return [name for name, on in used.items() if on] + extras

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """(output, h_n), for lstm (output, h_n, c_n); with ``return_cell_states`` the last layer's c of every step
        follows."""
        x, finals = self.input.contiguous(), []
        cells: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs, cells = [], []
            for direction in range(self.directions):
                y, *final, every = self._direction(x, layer * self.directions + direction, direction == 1, backend)
                outputs.append(y)
                cells.append(every)
                finals.append(final)
            x = _joined(outputs)
            if layer < self.num_layers - 1:
                x = self._dropped(x)
        states = tuple(_stacked(column) for column in zip(*finals, strict=True))
        return (x, *states, _joined(cells)) if self.extras.return_cell_states else (x, *states)

    def _direction(self, x: Tensor, index: int, reverse: bool, backend: str) -> tuple[Tensor, ...]:
        """(y, h_n[, c_n], cells) of one layer and direction."""
        extras = self.extras
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = (
            None if w is None else w.contiguous() for w in self.layer(index)
        )
        assert weight_ih is not None
        assert weight_hh is not None
        if extras.forget_bias and self.mode == "lstm":
            H = self.states[1].shape[2]
            added = torch.nn.functional.pad(weight_ih.new_full((H,), extras.forget_bias), (H, 2 * H))
            bias_ih = added if bias_ih is None else bias_ih + added
        if extras.weight_dropout:
            weight_hh = dropout(weight_hh, extras.weight_dropout, self.train)
        peephole = extras.peepholes[index].contiguous() if extras.peepholes else None
        norms = torch.cat(list(extras.norms[index])) if extras.norms else None
        options = ops.RNNOptions(self.mode, reverse, self.batch_first, **extras.of_an_op())
        hx, cx, *_ = (*(state[index].contiguous() for state in self.states), None)
        weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms)
        inputs = ops.RNNInputs(x, hx, cx, *weights, self.batch_sizes, self._seed())
        if extras.checkpoint_chunks > 1:
            results = ops.rnn_in_chunks(inputs, options, backend, extras.return_cell_states, extras.checkpoint_chunks)
        else:
            results = rnn(inputs, options, backend, extras.return_cell_states)
        y, hy, cy, every = results
        return (y, hy, every) if cx is None else (y, hy, cy, every)

    def _seed(self) -> Tensor | None:
        """What zoneout is drawn from, in training."""
        if not (self.train and (self.extras.zoneout or self.extras.zoneout_cell)):
            return None
        if ops.capturing():
            raise RuntimeError("zoneout: a CUDA graph would replay one mask; call eval(), or capture without zoneout")
        return ops.drawn_seed()

    def _dropped(self, x: Tensor) -> Tensor:
        """Between two layers."""
        if not (self.extras.variational_dropout and self.train):
            return dropout(x, self.dropout, self.train)
        # One mask for all steps of a sequence.
        mask = dropout(x.new_ones(self.states[0].shape[1], x.shape[-1]), self.dropout)
        if self.batch_sizes is not None:
            return x * torch.cat([mask[:n] for n in self.batch_sizes.tolist()])
        return x * mask.unsqueeze(1 if self.batch_first else 0)


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), -1)


def _stacked(states: Sequence[Tensor]) -> Tensor:
    return ops.as_shape(states[0], (1, *states[0].shape)) if len(states) == 1 else torch.stack(list(states))
