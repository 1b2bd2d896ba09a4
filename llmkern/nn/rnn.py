"""``RNN``, ``LSTM``, ``GRU`` and ``sLSTM``: recurrent layers over ``llmkern.functional``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._signature import FullSignature
from ._rnn import Layers


class RNN(Layers, torch.nn.RNN):
    """An Elman network with tanh or relu; see :class:`torch.nn.RNN`. Same arguments, inputs and outputs.

    Keywords that torch does not have: those of :class:`LSTM` but ``forget_bias``, ``peephole``, ``return_cell_states``;
    ``zoneout`` is one number.
    """

    _torch_class = torch.nn.RNN
    __signature__ = FullSignature(given=("mode", "proj_size"), after={"num_layers": ("nonlinearity", "tanh")})

    @property
    def _function(self) -> str:  # type: ignore[override]
        return self.mode.lower()

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, ...]:
        return self._forward(input, hx)


class LSTM(Layers, torch.nn.LSTM):
    """Long short-term memory; see :class:`torch.nn.LSTM`. Same arguments, inputs and outputs.

    Keywords that torch does not have, with neutral defaults:

    Args:
        clip: h of every step is held within [-clip, clip]. 0: it is not.
        zoneout: the share of h that keeps its former value at a step (Krueger et al., 2016): drawn in training, in
            evaluation a mixture. A pair: of h and of c.
        weight_dropout: the probability of zeroing a hidden weight for a whole call, in training (DropConnect, as in
            AWD-LSTM; Merity et al., 2017).
        variational_dropout: ``dropout`` between layers draws one mask for all steps of a sequence (Gal and Ghahramani,
            2016).
        num_heads: diagonal blocks of the hidden weights, which become (gates * H, H / num_heads).
        layer_norm: both products are normalised over all gates before biases are added (Ba et al., 2016), with weights
            ``weight_norm_ih`` and ``weight_norm_hh`` (gates * H). An LSTM normalises c as well before its tanh,
            with ``weight_norm_c`` and ``bias_norm_c`` (H).
        forget_bias: added to the forget gate before its sigmoid.
        peephole: weights (3, H) by which c acts on the gates i, f and, after the step, o (Gers and Schmidhuber, 2000).
        return_cell_states: the c of every step of the last layer is returned as well, after the final states, shaped as
            the output.
        checkpoint_chunks: the backward keeps the states between so many chunks of time and computes the gates of each
            again: a fraction of the memory for a third more time.
        state_dtype: of initial and final states, where it is not the input's: fp32 states carry what bf16 would round.
    """

    _function = "lstm"
    _torch_class = torch.nn.LSTM
    _pair = True

    def __init__(
        self,
        *args: Any,
        forget_bias: float = 0.0,
        peephole: bool = False,
        return_cell_states: bool = False,
        **kwargs: Any,
    ) -> None:
        self.forget_bias, self.peephole, self.return_cell_states = forget_bias, peephole, return_cell_states
        super().__init__(*args, **kwargs)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, ...]:
        return self._forward(input, hx)


class GRU(Layers, torch.nn.GRU):
    """Gated recurrent units; see :class:`torch.nn.GRU`. Same arguments, inputs and outputs.

    Keywords that torch does not have: those of :class:`LSTM` but ``forget_bias``, ``peephole``, ``return_cell_states``;
    ``zoneout`` is one number.
    """

    _function = "gru"
    _torch_class = torch.nn.GRU
    __signature__ = FullSignature(given=("mode", "proj_size"))

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, ...]:
        return self._forward(input, hx)


class sLSTM(Layers):
    """An LSTM with exponential input gates, a normaliser and a stabiliser (Beck et al., xLSTM, 2024). torch has none.

        c' = sigmoid(f) c + exp(i) tanh(z);  n' = sigmoid(f) n + exp(i);  h' = sigmoid(o) c' / n'

    with i, f, z, o = W x + b_ih + U h + b_hh. c and n are kept times exp(-m), m' = max(i, log sigmoid(f) + m), so that
    nothing overflows. Arguments, inputs and outputs are those of :class:`torch.nn.LSTM` but for ``proj_size``; c has 3H
    columns: c, n and m. ``num_heads`` blocks make the paper's memory mixing within heads.

    Keywords that torch does not have: those of :class:`LSTM` but ``forget_bias``, ``peephole``; ``return_cell_states``
    returns c, n and m.
    """

    _function = "slstm"
    _torch_class = torch.nn.LSTM
    _pair = True
    _cells = 3
    __signature__ = FullSignature(given=("mode", "proj_size"))

    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        layers, batch, hidden = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, 3 * hidden

    def _refused(self, input: Any, hx: Any) -> tuple[Any, ...]:
        if not isinstance(input, PackedSequence):
            super()._refused(input, hx)
        raise ValueError("sLSTM: got a malformed input or states; expected a tensor or PackedSequence and (h, c)")

    def __init__(self, *args: Any, return_cell_states: bool = False, **kwargs: Any) -> None:
        if kwargs.get("proj_size"):
            raise ValueError("proj_size argument is only supported for LSTM, not sLSTM")
        self.return_cell_states = return_cell_states
        # Parameters have an LSTM's shapes.
        super().__init__("LSTM", *args, **kwargs)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, ...]:
        return self._forward(input, hx)
