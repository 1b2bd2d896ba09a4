"""Cells, decoding step by step, and a model that is trained with either library."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import FLOATS, assert_accurate
from test_rnn import CLASSES, _pair

import llmkern
import llmkern.nn as nn


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cells(backend: str, device: torch.device, name: str, bias: bool, batched: bool) -> None:
    ours, theirs = (module.to(device) for module in _pair(name, 5, 7, bias=bias))
    x, pair = torch.randn((3, 5) if batched else 5, device=device), name == "LSTMCell"
    h = torch.randn((3, 7) if batched else 7, device=device)
    for hx in (None, (h, h.cos()) if pair else h):
        got, want = (module(x, hx) for module in (ours, theirs))
        for a, b in zip(got, want, strict=True) if pair else [(got, want)]:
            torch.testing.assert_close(a, b)
    relu, torchs = (module.to(device) for module in _pair("RNNCell", 5, 7, nonlinearity="relu"))
    torch.testing.assert_close(relu(x), torchs(x))


@pytest.mark.parametrize("name", [*CLASSES, "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoding_step_by_step(name: str, dtype: torch.dtype, batch_first: bool) -> None:
    cell = name.endswith("Cell")
    ours, theirs = _pair(name, 6, 20, dtype=dtype, **({} if cell else {"batch_first": batch_first}))
    x = torch.randn(5, 3, 6).to(dtype)
    results, states = [], []
    for module in (ours, theirs, copy.deepcopy(theirs).double()):
        wide, state = next(module.parameters()).dtype, None
        with torch.no_grad():
            for step in x.to(wide):
                if cell:
                    state = module(step, state)
                    y = state[0] if isinstance(state, tuple) else state
                else:
                    y, state = module(step.unsqueeze(1 if batch_first else 0), state)
        results.append(y)
        states.append(state if isinstance(state, tuple) else (state,))
    assert_accurate(results[0], results[2], results[1])
    for a, b, c in zip(states[0], states[2], states[1], strict=True):
        assert_accurate(a, b, c)
    if not cell:
        # What is written into the output stays out of the state.
        before = states[0][0].clone()
        results[0].fill_(9.0)
        assert torch.equal(states[0][0], before)


def test_a_step_that_cannot_take_the_short_way_takes_the_long_one() -> None:
    ours, theirs = _pair("LSTM", 5, 7)
    x, state = torch.randn(1, 3, 5), (torch.randn(1, 3, 7), torch.randn(1, 3, 7))
    with torch.no_grad():
        strided = tuple(s.transpose(1, 2).contiguous().transpose(1, 2) for s in state)
        torch.testing.assert_close(ours(x, strided), theirs(x, strided))
        for bad in ((state[0][:, :2], state[1]), (state[0], state[1][:, :2]), (state[0].double(), state[1].double())):
            texts = []
            for module in (ours, theirs):
                with pytest.raises(Exception) as error:  # noqa: PT011
                    module(x, bad)
                texts.append((error.type, str(error.value)))
            assert texts[0] == texts[1]
        assert torch.equal(ours(x, state)[0], ours(x, state)[0])
        with llmkern.backend("reference"):
            assert llmkern.explain(ours, x, state).backends == ("reference",)
        torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
        torch.testing.assert_close(ours(x, state), theirs(x, state))
        # A forward-mode derivative needs no grad mode.
        with llmkern.backend("reference"):
            tangent = torch.func.jvp(lambda x: ours(x, state)[0], (x,), (x,))[1]
        torch.testing.assert_close(torch.func.jvp(lambda x: ours(x, state)[0], (x,), (x,))[1], tangent)


# Two ways of computing the same thing drift apart by rounding alone: after 200 steps of training, losses still agree.
def test_a_language_model_trains_as_with_torch() -> None:
    g = torch.Generator().manual_seed(0)
    text = torch.randint(0, 16, (4096,), generator=g)
    text[1::2] = (text[::2] * 7 + 3) % 16
    losses = []
    for ns in (nn, torch.nn):
        torch.manual_seed(1)
        embedding, lstm, head = ns.Embedding(16, 12), ns.LSTM(12, 24, 2), ns.Linear(24, 16)
        parameters = [p for m in (embedding, lstm, head) for p in m.parameters()]
        optimizer, track = torch.optim.Adam(parameters, 1e-2), []
        for step in range(200):
            at = step * 17 % 3000
            tokens = text[at : at + 8 * 21].view(8, 21).t()
            y, _ = lstm(embedding(tokens[:-1]))
            loss = torch.nn.functional.cross_entropy(head(y).flatten(0, 1), tokens[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            track.append(loss.item())
        losses.append(torch.tensor(track))
    torch.testing.assert_close(losses[0][:20], losses[1][:20], atol=1e-4, rtol=1e-4)
    ours, theirs = (track[-20:].mean() for track in losses)
    assert theirs < losses[1][:20].mean() - 0.3
    assert abs(ours - theirs) < 0.02


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"])
def test_what_is_no_tensor_is_refused_in_torchs_words(name: str) -> None:
    gates, x, h = {"lstm": 4, "gru": 3}.get(name.split("_")[0], 1), torch.randn(2, 3), torch.randn(2, 5)
    weights = [torch.randn(gates * 5, width) for width in (3, 5)] + [torch.randn(gates * 5) for _ in range(2)]
    states = (h, h.clone()) if gates == 4 else h
    for k, weight in enumerate(weights):
        for thing in (weight.numpy(), weight.tolist(), 1.0):
            texts = []
            for where in (llmkern.functional, torch._VF):
                with pytest.raises(TypeError) as error:
                    getattr(where, name)(x, states, *weights[:k], thing, *weights[k + 1 :])
                texts.append(str(error.value))
            assert texts[0] == texts[1]
