"""``torch.utils.flop_counter`` counts our ops as it counts torch's products."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import llmkern.nn as nn

T, B, I, H, P = 9, 4, 64, 32, 8


def _counted(call: Callable[[], Any]) -> tuple[int, set[str]]:
    """The products' operations, and of which ops."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), {str(op) for op in counter.get_flop_counts()["Global"]}


def _training(module: torch.nn.Module, *inputs: Tensor, moving: bool) -> tuple[int, set[str]]:
    leaves = [t.clone().requires_grad_(moving) if t.is_floating_point() else t for t in inputs]

    def call() -> None:
        out = module(*leaves)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    return _counted(call)


SEQUENCE, ROWS = torch.randn(T, B, I), torch.randn(B, I)
# torch's dense LSTM is one oneDNN op on a CPU, and counts nothing: it is compared with a formula below.
CASES: dict[str, tuple[Callable[[Any], torch.nn.Module], tuple[Tensor, ...]]] = {
    # Large enough for our product.
    "Linear": (lambda n: n.Linear(1024, 512), (torch.randn(64, 1024),)),
    "Linear, too small": (lambda n: n.Linear(I, 5), (ROWS,)),
    "LSTM, projected": (lambda n: n.LSTM(I, H, 2, proj_size=P, bidirectional=True), (SEQUENCE,)),
    "GRU": (lambda n: n.GRU(I, H, 2, bidirectional=True), (SEQUENCE,)),
    "RNN": (lambda n: n.RNN(I, H, batch_first=True), (SEQUENCE,)),
    "RNN, states": (lambda n: n.RNN(I, H), (SEQUENCE, torch.randn(1, B, H))),
    "LSTMCell": (lambda n: n.LSTMCell(I, H), (ROWS,)),
    "GRUCell": (lambda n: n.GRUCell(I, H), (ROWS, torch.randn(B, H))),
    "LinearCrossEntropyLoss": (lambda n: n.LinearCrossEntropyLoss(I, 100, bias=True), (ROWS, torch.arange(B))),
    "Embedding": (lambda n: n.Embedding(10, I), (torch.arange(B),)),
}


@pytest.mark.parametrize("moving", [False, True], ids=["parameters", "and inputs"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_training_counts_what_torchs_counts(name: str, moving: bool) -> None:
    build, inputs = CASES[name]
    if not hasattr(torch.nn, name.split(",")[0]):
        pytest.skip(f"torch {torch.__version__} has no nn.{name}")
    ours, theirs = (_training(build(n), *inputs, moving=moving) for n in (nn, torch.nn))
    assert ours[0] == theirs[0]
    assert (ours[0] > 0) == (name != "Embedding")


@pytest.mark.parametrize("mode", ["LSTM", "sLSTM"])
@pytest.mark.parametrize("moving", [False, True], ids=["parameters", "and inputs"])
def test_a_dense_lstm_counts_its_products(mode: str, moving: bool) -> None:
    counted, by = _training(getattr(nn, mode)(I, H), SEQUENCE, moving=moving)
    of_x, of_h = T * B * I * 4 * H, T * B * H * 4 * H
    # Forward; gradients of both weights; of h, but for the first step's, and of x.
    assert counted == 2 * (2 * (of_x + of_h) + (of_h - B * H * 4 * H) + of_x * moving)
    assert by == {"llmkern.rnn_forward", "llmkern.rnn_backward"}


def test_packed_sequences_count_their_tokens() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (5, 3, 1)])
    for name in ("LSTM", "GRU", "RNN"):
        ours, theirs = (_counted(lambda n=n, name=name: getattr(n, name)(I, H)(packed)) for n in (nn, torch.nn))
        assert ours[0] == theirs[0] > 0


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_decoding_counts_too(name: str) -> None:
    module = getattr(nn, name)(I, H)
    gates = module.weight_ih_l0.shape[0] if name in ("LSTM", "GRU", "RNN") else module.weight_ih.shape[0]
    x, h = (SEQUENCE[:1], torch.zeros(1, B, H)) if "Cell" not in name else (ROWS, torch.zeros(B, H))
    with torch.no_grad():
        assert _counted(lambda: module(x, (h, h) if "LSTM" in name else h))[0] == 2 * B * gates * (I + H)


def test_losses_of_rows_compute_logits_twice_and_say_so() -> None:
    loss = nn.LinearCrossEntropyLoss(I, 100, reduction="none")
    once = 2 * B * I * 100
    assert _training(loss, ROWS, torch.arange(B), moving=True)[0] == 4 * once
    with torch.no_grad():
        assert _counted(lambda: loss(ROWS, torch.arange(B)))[0] == once


def test_a_model_counts_by_module() -> None:
    def model(n: Any) -> torch.nn.Module:
        return torch.nn.Sequential(n.Embedding(50, I), n.Linear(I, 1024), n.Linear(1024, 512))

    tables = []
    for n in (nn, torch.nn):
        with FlopCounterMode(display=False) as counter:
            model(n)(torch.arange(48).view(4, 12)).sum().backward()
        tables.append({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})
    assert tables[0] == tables[1]
    assert tables[0]["Sequential.2"] == 3 * 2 * 48 * 1024 * 512


@pytest.mark.parametrize("first", ["llmkern.nn", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter_and_the_counter_comes_only_when_asked(first: str) -> None:
    code = f"""
import sys, importlib, torch
importlib.import_module({first!r})
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "llmkern.nn")
import llmkern.nn as nn
from torch.utils.flop_counter import FlopCounterMode
assert not any(type(finder).__name__ == "_WhenImported" for finder in sys.meta_path)
with FlopCounterMode(display=False) as counter:
    nn.LSTM(3, 5)(torch.randn(2, 4, 3))
assert counter.get_total_flops() == 2 * 2 * 4 * 20 * 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)
