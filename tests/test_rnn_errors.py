"""What torch's recurrent modules refuse, ours refuse with the same type and text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llmkern
import llmkern.nn as nn
from llmkern import ops

CLASSES = ["LSTM", "GRU", "RNN"]


def _pair(name: str) -> tuple[Any, Any]:
    return getattr(nn, name)(5, 7), getattr(torch.nn, name)(5, 7)


def _wrong_calls() -> dict[str, Any]:
    x, pack = torch.randn(4, 3, 5), pack_padded_sequence
    calls: dict[str, Any] = {
        "4-D input": lambda m, s: m(torch.randn(2, 4, 3, 5)),
        "1-D input": lambda m, s: m(torch.randn(5)),
        "features": lambda m, s: m(torch.randn(4, 3, 6)),
        "dtype": lambda m, s: m(x.double()),
        "no steps": lambda m, s: m(torch.randn(0, 3, 5)),
        "state size": lambda m, s: m(x, s(torch.randn(1, 2, 7))),
        "state layers": lambda m, s: m(x, s(torch.randn(2, 3, 7))),
        "2-D state for 3-D input": lambda m, s: m(x, s(torch.randn(3, 7))),
        "3-D state for 2-D input": lambda m, s: m(x[:, 0], s(torch.randn(1, 3, 7))),
        "packed state size": lambda m, s: m(pack(x, torch.tensor([4, 2, 1])), s(torch.randn(1, 2, 7))),
        "packed features": lambda m, s: m(pack(torch.randn(4, 3, 6), torch.tensor([4, 2, 1]))),
        "packed 1-D": lambda m, s: m(PackedSequence(torch.randn(7), torch.tensor([3, 2, 1, 1]))),
    }
    return calls


@pytest.mark.parametrize(("name", "call"), list(itertools.product(CLASSES, _wrong_calls())))
def test_errors_are_torchs(name: str, call: str) -> None:
    texts = []
    for module in _pair(name):
        with pytest.raises(Exception) as error:  # noqa: PT011
            _wrong_calls()[call](module, lambda h: (h, h) if name == "LSTM" else h)
        texts.append((error.type, str(error.value)))
    assert texts[0] == texts[1]


WRONG_CONSTRUCTIONS: dict[str, Any] = {
    "dropout": lambda c: c(5, 7, dropout=1.5),
    "hidden_size": lambda c: c(5, 0),
    "hidden_size type": lambda c: c(5, 7.5),
    "num_layers": lambda c: c(5, 7, num_layers=0),
    "proj_size": lambda c: c(5, 7, proj_size=7),
    "negative proj_size": lambda c: c(5, 7, proj_size=-1),
    "nonlinearity": lambda c: c(5, 7, nonlinearity="sigmoid"),
    "unknown": lambda c: c(5, 7, colour="red"),
}


@pytest.mark.parametrize(("name", "call"), list(itertools.product(CLASSES, WRONG_CONSTRUCTIONS)))
def test_constructor_errors_are_torchs(name: str, call: str) -> None:
    texts = []
    for namespace in (nn, torch.nn):
        with pytest.raises(Exception) as error:  # noqa: PT011
            WRONG_CONSTRUCTIONS[call](getattr(namespace, name))
        texts.append((error.type, str(error.value)))
    assert texts[0] == texts[1]


CELL_CALLS: dict[str, Any] = {
    "3-D input": lambda m, s: m(torch.randn(2, 3, 5)),
    "3-D state": lambda m, s: m(torch.randn(3, 5), s(torch.randn(1, 3, 7))),
    "features": lambda m, s: m(torch.randn(3, 6)),
    "state width": lambda m, s: m(torch.randn(3, 5), s(torch.randn(3, 8))),
    "state batch": lambda m, s: m(torch.randn(3, 5), s(torch.randn(2, 7))),
}


@pytest.mark.parametrize(("name", "call"), list(itertools.product(["LSTMCell", "GRUCell", "RNNCell"], CELL_CALLS)))
def test_cell_errors_are_torchs(name: str, call: str) -> None:
    texts = []
    for module in _pair(name):
        with pytest.raises(Exception) as error:  # noqa: PT011
            CELL_CALLS[call](module, lambda h: (h, h) if name == "LSTMCell" else h)
        texts.append((error.type, str(error.value)))
    assert texts[0] == texts[1]


def test_a_kernel_argument_of_the_wrong_shape_is_refused() -> None:
    if llmkern.dispatch.unavailable("native") is not None:
        pytest.skip("no native build")
    from llmkern import native

    shapes = [(2, 3, 5), (3, 7), (3, 7), (28, 5), (28, 7), (28,), (28,), (4, 7), (3, 7), (70,)]
    good: list[Any] = [torch.zeros(s) for s in shapes]
    good[7] = None
    options = ops.RNNOptions("lstm")

    def run(tensors: list[Any], sizes: Tensor | None = None, options: ops.RNNOptions = options) -> None:
        native.rnn_forward(*tensors, sizes, None, *options, True)

    run(good)
    for index in (1, 2, 3, 4, 5, 6, 8, 9):
        bad = list(good)
        bad[index] = torch.zeros([n + 1 for n in good[index].shape])
        with pytest.raises(ValueError, match="expected"):
            run(bad)
    with pytest.raises(ValueError, match="mode lstm, gru, rnn_tanh, rnn_relu or slstm, got elman"):
        run(good, options=options._replace(mode="elman"))
    with pytest.raises(ValueError, match="for lstm and slstm alone"):
        run(good, options=options._replace(mode="gru"))
    packed = [torch.zeros(6, 5), *good[1:]]
    run(packed, torch.tensor([3, 2, 1]))
    for sizes in ([3, 3, 1], [2, 2, 1], [3, 1, 2], [3, 3, 0], [4, 2]):
        with pytest.raises(ValueError, match="batch_sizes: expected"):
            run(packed, torch.tensor(sizes))
