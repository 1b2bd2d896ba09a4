"""Recurrent networks of several layers and directions, with the signatures that torch's modules call.

Each of ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu`` and ``slstm`` is called in one of two ways, as ``torch._VF``'s:

    lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

Args:
    input: (T, B, I), or (B, T, I) with ``batch_first``.
    data, batch_sizes: a PackedSequence's (total, I) and (T).
    hx: the first state (layers * directions, B, H); for ``lstm`` a pair (h, c), h of width P with projections; for
        ``slstm`` (h, c), c of width 3H. Beside a bf16 or fp16 input they may be fp32, and then so are the final states
        (torch takes one dtype only, but under autocast, where its rule holds).
    params: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] of every layer and direction, in torch's order. They
        need not lie in one buffer. A weight_hh (G * H, H / n) holds the n blocks of a diagonal.
    dropout: probability of zeroing an element between two layers, if ``train``.
    Keywords beyond torch's: those of :class:`llmkern.nn.LSTM`, but ``peepholes`` (3, H), one for every layer and
        direction, for ``peephole``; ``norms``, the weights of ``layer_norm``, a sequence for each; and ``zoneout_cell``
        for the second of a pair.

Returns:
    (output, h_n), for ``lstm`` and ``slstm`` (output, h_n, c_n), shaped as torch shapes them; with
    ``return_cell_states`` also the c of every step of the last layer, in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from dataclasses import fields
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import dispatch, ops
from .._facts import GATES, RNN_MODES
from .._torch import VF
from ..ops import differentiating
from ..ops.rnn import rnn
from ._overrides import overridden
from ._rnn_layers import RNNCall
from ._rnn_options import Extras


def _recurrent(mode: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    asked = [t for arg in args[:4] for t in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    if overridden(mode, *asked):
        if mode == "slstm" or options:
            return handle_torch_function(_PUBLIC[mode], asked, *args, **options)
        return getattr(VF, mode)(*args)
    call = RNNCall.parse(mode, args, Extras.of(options))
    backend, kind = "torch", call.input.device.type
    if call.well_formed():
        served = call.cast(torch.get_autocast_dtype(kind)) if call.autocast else call
        used = (served or call).options() + (["autocast"] if served is None else [])
        call = served or call
        tensors = [call.input, *call.params, *call.extras.tensors()]
        tensors += [] if call.wide_states else call.states
        used += dispatch.not_plain(*tensors, *call.states, call.batch_sizes)
        T, B = (call.input.shape[i] for i in ((1, 0) if call.batch_first else (0, 1)))
        H, graph = call.states[-1].shape[2], ops.differentiating(*tensors)
        # Of nothing there is nothing to gain.
        if call.input.numel() or not dispatch.serves("torch", mode, used):
            backend = dispatch.pick(mode, *tensors, options=used, steps=T, batch=B, units=H, grad=graph)
    if backend == "torch" and mode == "slstm":
        if not call.input.shape[1 if call.batch_first else 0]:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        shapes = [tuple(t.shape) for t in (call.input, *call.states, *call.params)]
        raise ValueError(f"slstm: shapes do not fit: input, h, c and weights are {shapes}; see llmkern.nn.sLSTM")
    if backend == "torch":
        return getattr(VF, mode)(*args)
    if not call.autocast:
        return call.run(backend)
    with torch.autocast(kind, enabled=False):
        y, *rest = call.run(backend)
    # Where torch's steps carry fp32, its outputs are fp32.
    return (y if call.extras.state_dtype is not None else y.to(call.states[0].dtype)), *rest


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def step(mode: str, x: Tensor, states: tuple[Tensor, ...], *weights: Tensor | None) -> tuple[Tensor, ...] | None:
    """One step of a plain layer or cell that nothing will differentiate, by the shortest way: decoding calls it for
    every token, and a small step takes less time than the ways of larger calls.

    Args:
        mode: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x, states: (..., I) and (..., H), with leading sizes that agree in number.
        weights: weight_ih, weight_hh, bias_ih, bias_hh.

    Returns:
        The new states, shaped as the old ones; ``None`` if the call must go another way, be it to be refused.
    """
    kernels = dispatch.shortcut("native")
    # A mode is asked by the long way.
    if kernels is None or torch._C._is_torch_function_mode_enabled():
        return None
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    if not _PLAIN.issuperset(map(type, (x, *states, *weights))) or differentiating(x, *states, *weights):
        return None
    try:
        if mode == "lstm":
            return kernels.lstm_step(x, *states, *weights)
        return (kernels.rnn_step(x, *states, *weights, RNN_MODES.index(mode)),)
    except (RuntimeError, TypeError, ValueError):
        return None


def lstm(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """Long short-term memory; see this module for arguments and results, :class:`torch.nn.LSTM` for the formula."""
    return _recurrent("lstm", args, options)


def gru(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """Gated recurrent units; see this module for arguments and results, :class:`torch.nn.GRU` for the formula."""
    return _recurrent("gru", args, options)


def slstm(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """LSTM with exponential gates; see this module for arguments and results, :class:`llmkern.nn.sLSTM` for the
    formula. torch has none."""
    return _recurrent("slstm", args, options)


def rnn_tanh(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """An Elman network with tanh; see this module for arguments and results, :class:`torch.nn.RNN` for the formula."""
    return _recurrent("rnn_tanh", args, options)


def rnn_relu(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """An Elman network with relu; see this module for arguments and results, :class:`torch.nn.RNN` for the formula."""
    return _recurrent("rnn_relu", args, options)


_PUBLIC = {"lstm": lstm, "gru": gru, "slstm": slstm, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}


def _show_arguments() -> None:
    """What ``help`` shows is the first of the two forms, and the keywords."""
    names = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
    visible = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in names]
    visible += [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(Extras)]
    for function in _PUBLIC.values():
        function.__signature__ = Signature(visible)  # type: ignore[attr-defined]


_show_arguments()


def _cell(mode: str, input: Tensor, hx: Any, *weights: Tensor | None) -> Any:
    name, states = f"{mode}_cell", tuple(hx) if mode == "lstm" else (hx,)
    if overridden(name, input, *states, *weights):
        return getattr(VF, name)(input, hx, *weights)
    backend = "torch"
    if _cell_is_well_formed(mode, input, states, weights):
        tensors = [t for t in (*states, *weights) if t is not None]
        options = dispatch.not_plain(input, *tensors)
        if dispatch.autocasts(input):
            options = [*options, "autocast"]
        graph = ops.differentiating(input, *tensors)
        backend = dispatch.pick(name, input, *tensors, options=options, batch=input.shape[0], grad=graph)
    if backend == "torch":
        return getattr(VF, name)(input, hx, *weights)
    x, h, *c = (t.contiguous() for t in (input, *states))
    weight_ih, weight_hh, bias_ih, bias_hh = (None if w is None else w.contiguous() for w in weights)
    assert weight_ih is not None
    assert weight_hh is not None
    inputs = ops.RNNInputs(x.unsqueeze(0), h, c[0] if c else None, weight_ih, weight_hh, bias_ih, bias_hh)
    _, hy, cy, _ = rnn(inputs, ops.RNNOptions(mode), backend)
    return (hy, cy) if c else hy


def _cell_is_well_formed(mode: str, x: Tensor, states: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]) -> bool:
    """Whether torch would accept the call; if not, torch gets it, for its error."""
    if not all(t is None or isinstance(t, Tensor) for t in (x, *states, *weights)):
        return False
    if x.dim() != 2 or not x.numel() or len(states) != (2 if mode == "lstm" else 1) or states[0].dim() != 2:
        return False
    (B, I), H = x.shape, states[0].shape[1]
    rows = GATES[mode] * H
    weight_ih, weight_hh, *biases = weights
    return (
        H > 0
        and all(state.shape == (B, H) for state in states)
        and weight_ih is not None
        and weight_hh is not None
        and weight_ih.shape == (rows, I)
        and weight_hh.shape == (rows, H)
        and all(bias is None or bias.shape == (rows,) for bias in biases)
    )


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
