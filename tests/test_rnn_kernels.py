"""What is special to the Triton kernels of recurrent layers: blocks and their boundaries, the ways through time, what
is launched for which sizes, packed sequences in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import INTERPRETING, kernels
from recurrent import build, inputs, run
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern.nn as nn
from llmkern import dispatch
from llmkern._facts import CELLS, GATES
from llmkern._groups import RNNCotangents, RNNInputs, RNNOptions, RNNSaved

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETING or not kernels("lstm"), reason="of Triton's interpreter"),
]
NAMES = ["LSTM", "GRU", "RNN", "sLSTM"]


def _compare(module: Any, x: Any, states: Any) -> None:
    for a, b in zip(run(module, x, states, "triton"), run(module, x, states, "reference"), strict=True):
        torch.testing.assert_close(a, b)


# In fp64 a program has 16 sequences, and up to 32 units or 16 of more.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 15), (2, 16, 16), (3, 17, 33), (2, 15, 49)])
def test_boundaries_of_blocks(name: str, T: int, B: int, H: int) -> None:
    module = build(name, 3, H, bidirectional=True).double()
    _, states = inputs(name, B, "steps", torch.float64, H, layers=2)
    _compare(module, torch.randn(T, B, 3, dtype=torch.float64), states)


# Every length, and a whole block of sequences that end or begin in the middle of the others.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lengths", "H"), [([5, 4, 3, 2, 1], 34), ([4] * 5 + [2] * 13 + [1] * 16, 3)])
def test_packed_sequences_in_both_directions(name: str, lengths: list[int], H: int) -> None:
    B = len(lengths)
    module = build(name, 3, H, bidirectional=True).double()
    x = pack_padded_sequence(torch.randn(max(lengths), B, 3, dtype=torch.float64), torch.tensor(lengths))
    _compare(module, x, inputs(name, B, "steps", torch.float64, H, layers=2)[1])


Arguments = tuple[RNNInputs, RNNOptions]


def _arguments(mode: str, T: int, B: int, H: int, dtype: torch.dtype, device: str, reverse: bool = False) -> Arguments:
    G, C = GATES[mode], CELLS[mode]
    shapes = [(T, B, 5), (B, H), (B, C * H), (G * H, 5), (G * H, H), (G * H,), (G * H,)]
    tensors = RNNInputs(*(torch.randn(shape, device=device).to(dtype) for shape in shapes))
    return tensors if C else tensors._replace(cx=None), RNNOptions(mode, reverse)


def _both_ways(arguments: Arguments) -> list[Tensor]:
    """Results of the forward, then of the backward for cotangents that are the results."""
    tensors, options = arguments
    namespace = dispatch.load("triton")
    y, hy, cy, *saved = namespace.rnn_forward(tensors, options, True)
    cotangents = RNNCotangents(y, hy, cy if cy.numel() else None, None)
    gradients = namespace.rnn_backward(cotangents, tensors, RNNSaved(y, *saved), options, True, True, True)
    return [y, hy, cy, *saved, *gradients]


@pytest.mark.parametrize(("mode", "reverse"), [("lstm", False), ("gru", True)])
def test_steps_in_chunks_and_repeated_runs(mode: str, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkern.kernels import rnn

    arguments = _arguments(mode, 5, 3, 6, torch.float64, "cpu", reverse=reverse)
    whole = _both_ways(arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole, _both_ways(arguments), strict=True))
    monkeypatch.setattr(rnn, "WORKSPACE", 2 * 3 * GATES[mode] * 6 * 8)
    for a, b in zip(whole, _both_ways(arguments), strict=True):
        torch.testing.assert_close(a, b)
    # A packed batch that happens to have no gaps.
    tensors, options = arguments
    packed = tensors._replace(x=tensors.x.flatten(0, 1), batch_sizes=torch.full((5,), 3))
    for a, b in zip(whole, _both_ways((packed, options)), strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten())


@pytest.mark.parametrize("mode", GATES)
def test_programs_that_stay_give_the_bits_of_one_that_is_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkern.kernels import _rnn_layer

    # Its chain is one program, so that it never waits, which the interpreter could not.
    arguments = _arguments(mode, 3, 17, 11, torch.float64, "cpu")
    alone = _both_ways(arguments)
    monkeypatch.setitem(_rnn_layer.ALONE, torch.float64, 0)
    counted = []
    zeros = _rnn_layer.torch.zeros
    monkeypatch.setattr(_rnn_layer.torch, "zeros", lambda *a, **k: counted.append(zeros(*a, **k)) or counted[-1])
    together = _both_ways(arguments)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    # A counter for each chain, forward and backward; the last step of the backward signals too.
    assert [c.tolist() for c in counted if c.dtype == torch.int32] == [[3, 3], [4, 4]]


WAYS = {
    "alone": (("lstm", 7, 40, 128, torch.bfloat16), [(3, 1)], False),
    "together": (("lstm", 7, 64, 1024, torch.bfloat16), [(1, 64)], True),
    "together, at most one a multiprocessor": (("gru", 7, 128, 1024, torch.float32), [(2, 64)], True),
    "step by step": (("lstm", 7, 129, 1024, torch.bfloat16), [(3, 64)] * 7, False),
    "one step": (("rnn_tanh", 1, 64, 1024, torch.bfloat16), [(1, 64)], False),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_gpu_is_given(way: str) -> None:
    from llmkern.kernels import _launch, _rnn_backward, rnn

    (mode, T, B, H, dtype), grids, cooperative = WAYS[way]
    with _launch.recording() as launches:
        _both_ways(_arguments(mode, T, B, H, dtype, "meta"))
    forward = [made for made in launches if made.kernel is rnn.rnn_forward_kernel]
    assert [made.grid for made in forward] == grids
    assert all(made.options.get("launch_cooperative_grid", False) == cooperative for made in forward)
    backward = [made for made in launches if made.kernel is _rnn_backward.rnn_backward_kernel]
    # A step more, to the first states; of a single step it makes two, with a wait between them.
    assert [made.grid for made in backward] == (grids if len(grids) == 1 else [*grids, grids[0]])
    assert all(
        made.options.get("launch_cooperative_grid", False) == (cooperative or way == "one step") for made in backward
    )


def test_products_of_fp32_follow_torchs_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkern.kernels import _launch

    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        for dtype in (torch.float32, torch.bfloat16):
            with _launch.recording() as launches:
                _both_ways(_arguments("gru", 2, 3, 4, dtype, "meta"))
            found = {made.constexprs["S"].PRECISION.value for made in launches if "S" in made.constexprs}
            assert found == {precision if dtype == torch.float32 else "ieee"}


def test_auto_leaves_to_cudnn_what_it_serves() -> None:
    x = torch.zeros(1)
    for op in ("lstm", "gru", "rnn_tanh", "lstm_cell"):
        reason = dispatch._obstacle("triton", op, (x,), ["batch_sizes"] if op == "lstm" else [], {})
        assert reason == "not yet measured against cuDNN on a GPU: backend('triton') takes it"
        with dispatch.backend("triton"):
            assert dispatch._obstacle("triton", op, (x,), [], {}) is None
    assert dispatch._obstacle("triton", "gru", (x,), ["clip"], {}) is None
    assert dispatch._obstacle("triton", "slstm", (x,), [], {}) is None
    with dispatch.backend("triton"), pytest.raises(dispatch.BackendError, match="does not serve proj_size"):
        nn.LSTM(3, 4, proj_size=2)(torch.zeros(2, 1, 3))
