"""In-place work between a forward and its backward, and on results: where torch is right so are we, and where torch
refuses we refuse or are right. Every argument of recurrent layers: ``test_rnn_inplace.py``."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from recurrent import tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern.functional as F
import llmkern.nn as nn


@pytest.mark.parametrize("options", [{}, {"return_cell_states": True, "zoneout": 0.3, "layer_norm": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_overwritten_outputs_are_computed_again(options: dict[str, Any], packed: bool) -> None:
    lstm = nn.LSTM(5, 7, num_layers=2, bidirectional=True, **options).double()
    x = torch.randn(6, 3, 5).double()
    given = pack_padded_sequence(x, torch.tensor([6, 4, 2])) if packed else x
    results = []
    for overwrite, hooked in ((False, False), (True, False), (True, True), (False, True)):
        # Hooks that hide changes from autograd, and those that keep a copy.
        pack = (lambda t: t) if overwrite else (lambda t: t.clone())
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t) if hooked else contextlib.nullcontext()
        torch.manual_seed(2)
        with hooks:
            outputs = tensors(lstm(given))
        loss = sum((out * k).sum() for k, out in enumerate(outputs, 1))
        if overwrite or hooked:
            with torch.no_grad():
                for out in outputs:
                    out.mul_(2)
        results.append(torch.autograd.grad(loss, list(lstm.parameters())))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("how", ["eager", "transformed"])
def test_an_inplace_activation_may_follow_a_layer(name: str, how: str) -> None:
    torch.manual_seed(0)
    ours, theirs, x = getattr(nn, name)(5, 7), getattr(torch.nn, name)(5, 7), torch.randn(4, 3, 5)
    theirs.load_state_dict(ours.state_dict())

    def loss(values: dict[str, Tensor], module: Any = ours) -> Tensor:
        y, _ = torch.func.functional_call(module, values, (x,))
        # torch's own LSTM refuses.
        return torch.relu_((y if module is ours else y.clone()).masked_fill_(x[..., :1] > 1, 3.0)).sum()

    values = dict(ours.named_parameters())
    if how == "transformed":
        got = torch.func.grad(loss)(values)
    else:
        got = dict(zip(values, torch.autograd.grad(loss(values), list(values.values())), strict=True))
    for key, parameter in theirs.named_parameters():
        gradient = torch.autograd.grad(loss(dict(theirs.named_parameters()), theirs), parameter)[0]
        torch.testing.assert_close(got[key], gradient)


def test_an_output_of_a_compiled_layer_may_be_overwritten() -> None:
    gru, x = nn.GRU(5, 7), torch.randn(4, 3, 5)
    gradients = []
    for layer in (gru, torch.compile(gru, backend="aot_eager", fullgraph=True)):
        y, _ = layer(x)
        gradients.append(torch.autograd.grad(y.mul_(2).relu_().sum(), list(gru.parameters())))
    torch.testing.assert_close(*gradients)


_INDEX = torch.tensor([[1, 2, 0, 1], [3, 3, 9, 5], [0, 0, 4, 8]])


def _recurrent(name: str, **options: Any) -> Any:
    def call(namespace: Any, _: Any) -> Any:
        cell, steps = name.endswith("Cell"), options.get("steps", 4)
        kwargs = {key: value for key, value in options.items() if key not in ("steps", "packed")}
        module = getattr(namespace, name)(6, 5, **kwargs)
        x = torch.randn(3, 6) if cell else torch.randn((3, steps, 6) if "batch_first" in kwargs else (steps, 3, 6))
        if "packed" in options:
            x = pack_padded_sequence(x, torch.tensor([4, 3, 2]))
        h = torch.randn(3, 5) if cell else torch.randn(1, 3, 5)
        return module(x, (h, h.clone()) if "LSTM" in name else h)

    return call


RESULTS: dict[str, Any] = {
    "embedding": lambda _, f: f.embedding(_INDEX, torch.randn(10, 6)),
    "one row": lambda _, f: f.embedding(_INDEX[0, 0], torch.randn(10, 6)),
    "bags": lambda _, f: f.embedding_bag(_INDEX, torch.randn(10, 6)),
    "linear": lambda _, f: f.linear(torch.randn(3, 4, 6), torch.randn(8, 6), torch.randn(8)),
    "large linear": lambda _, f: f.linear(torch.randn(2, 64, 256), torch.randn(128, 256)),
    "losses": lambda _, f: f.cross_entropy(torch.randn(12, 6), torch.zeros(12).long(), reduction="none"),
    "losses of places": lambda _, f: f.cross_entropy(torch.randn(3, 6, 4), _INDEX % 6, reduction="none"),
    "loss": lambda _, f: f.cross_entropy(torch.randn(12, 6), torch.zeros(12).long()),
    "squared errors": lambda _, f: f.mse_loss(torch.randn(3, 4), torch.randn(3, 4), reduction="none"),
    "dropout": lambda _, f: f.dropout(torch.randn(3, 4), 0.5),
    **{
        f"{name} {options}": _recurrent(name, **options)
        for name in ("LSTM", "GRU", "RNN")
        for options in ({}, {"steps": 1}, {"batch_first": True}, {"batch_first": True, "steps": 1}, {"packed": True})
    },
    **{name: _recurrent(name) for name in ("LSTMCell", "GRUCell", "RNNCell")},
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_results_can_be_changed_in_place_and_share_nothing(name: str, mode: Any) -> None:
    with mode():
        theirs, ours = (tensors(RESULTS[name](*where)) for where in ((torch.nn, torch.nn.functional), (nn, F)))
    for k, (result, torchs) in enumerate(zip(ours, theirs, strict=True)):
        others = [other.clone() for other in ours[:k] + ours[k + 1 :]]
        # With a tensor that needs a gradient, where torch's own result takes it.
        moved = torch.ones((), requires_grad=True)
        try:
            torchs += moved
        except RuntimeError:
            moved = moved.detach()
        if mode is not torch.inference_mode:
            before = result.clone()
            result += moved
            assert torch.equal(result, before + 1)
        assert all(map(torch.equal, others, ours[:k] + ours[k + 1 :]))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 2}])
def test_logits_may_change_after_unreduced_losses(options: dict[str, Any]) -> None:
    leaf, target = torch.randn(6, 5).requires_grad_(), torch.randint(0, 5, (6,))
    weights, results = torch.rand(6), []
    for function in (F.cross_entropy, torch.nn.functional.cross_entropy):
        logits = leaf * 1
        losses = function(logits, target, reduction="none", **options)
        first = torch.autograd.grad(losses, leaf, weights, retain_graph=True)
        with torch.no_grad():
            logits.mul_(3)
        results.append((*first, *torch.autograd.grad(losses, leaf, 2 * weights)))
    torch.testing.assert_close(*results)
