"""In-place work between a forward and its backward, and on results: where torch is right so are we, and where torch
refuses we refuse or are right. Every argument of recurrent layers: ``test_rnn_inplace.py``."""

from __future__ import annotations

import contextlib
import itertools
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
    "layer norm": lambda _, f: f.layer_norm(torch.randn(3, 2, 4), (2, 4)),
    "large layer norm": lambda _, f: f.layer_norm(torch.randn(512, 2, 1024), (1024,)),
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


# The function, its arguments and which of them need a gradient; the last one is changed for another valid one.
_TARGET = torch.tensor([0, 3, 2, 1, 2, 4])
_SOFT = torch.randn(6, 5).softmax(1)


def _losses(**options: Any) -> dict[str, tuple[Any, ...]]:
    x, w, b, weight = torch.randn(6, 5), torch.randn(5, 5), torch.randn(5), torch.rand(5)
    chunks = {"linear_weight": w, "target": _TARGET, "linear_bias": b}
    return {
        "cross_entropy": ("cross_entropy", {"input": x, "target": _TARGET}, options),
        "weighted": ("cross_entropy", {"input": x, "target": _TARGET, "weight": weight}, options),
        "smoothed": ("cross_entropy", {"input": x, "target": _TARGET}, {"label_smoothing": 0.1, **options}),
        "ignoring": ("cross_entropy", {"input": x, "target": _TARGET}, {"ignore_index": 2, **options}),
        "probabilities": ("cross_entropy", {"input": x, "target": _SOFT}, options),
        "places": ("cross_entropy", {"input": x.view(1, 5, 6), "target": _TARGET.view(1, 6)}, options),
        "nll_loss": ("nll_loss", {"input": x, "target": _TARGET, "weight": weight}, options),
        "linear": ("linear_cross_entropy", {"input": x, **chunks}, options),
        "linear, probabilities": ("linear_cross_entropy", {"input": x, **chunks, "target": _SOFT}, options),
        "mse_loss": ("mse_loss", {"input": x, "target": _SOFT}, options),
    }


CALLS: dict[str, tuple[Any, ...]] = {
    f"{name}, {reduction}": call
    for reduction in ("none", "mean", "sum")
    for name, call in _losses(reduction=reduction).items()
    if hasattr(torch.nn.functional, call[0])
}
_TABLE, _SAMPLES = torch.randn(5, 4), torch.rand(2, 6)
_BAGS = {"input": torch.stack([_TARGET, _TARGET.flip(0)]), "weight": _TABLE}
CALLS |= {
    "linear layer": ("linear", {"input": torch.randn(6, 5), "weight": torch.randn(3, 5), "bias": torch.randn(3)}, {}),
    "embedding": ("embedding", _BAGS, {}),
    "embedding, sparse": ("embedding", _BAGS, {"sparse": True}),
    "bags, max": ("embedding_bag", _BAGS, {"mode": "max"}),
    "bags, mean": ("embedding_bag", _BAGS, {}),
    "bags, offsets": (
        "embedding_bag",
        {"input": _TARGET, "weight": _TABLE, "offsets": torch.tensor([0, 2])},
        {"mode": "sum"},
    ),
    "bags, weighted": ("embedding_bag", {**_BAGS, "per_sample_weights": _SAMPLES}, {"mode": "sum"}),
}


class Call:
    """A call whose arguments can be changed before its gradients are asked for."""

    def __init__(self, namespace: Any, function: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
        self.leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if _moves(function, name, t)}
        self.given = {name: self.leaves[name] * 1 if name in self.leaves else t.clone() for name, t in tensors.items()}
        self.out = getattr(namespace, function)(**self.given, **options)

    def change(self, name: str) -> None:
        t = self.given[name]
        with torch.no_grad():
            t.mul_(0.5) if t.is_floating_point() else t.sub_(t.clone().sign())

    def gradients(self, scale: float = 1.0) -> list[Tensor] | str:
        cotangent = torch.arange(1.0, self.out.numel() + 1).view(self.out.shape) * scale
        try:
            got = torch.autograd.grad(self.out, list(self.leaves.values()), cotangent, retain_graph=True)
        except RuntimeError as error:
            return str(error)
        return [g.to_dense() if g.is_sparse else g for g in got]


def _moves(function: str, name: str, t: Tensor) -> bool:
    """Class weights have no gradient."""
    return t.is_floating_point() and not (name == "weight" and function in ("cross_entropy", "nll_loss"))


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_may_change_where_torch_lets_it(name: str) -> None:
    function, tensors, options = CALLS[name]
    right = Call(torch.nn.functional, function, tensors, options).gradients()
    assert not isinstance(right, str)
    for changed, twice in itertools.product(tensors, (False, True)):
        theirs, ours = (Call(namespace, function, tensors, options) for namespace in (torch.nn.functional, F))
        if twice:
            torch.testing.assert_close(ours.gradients(), right)
        theirs.change(changed)
        ours.change(changed)
        expected, got = theirs.gradients(), ours.gradients(2.0)
        if isinstance(got, str):
            assert "modified by an inplace operation" in got, changed
            assert isinstance(expected, str), changed
        else:
            torch.testing.assert_close(got, [2 * g for g in right], msg=lambda text, at=changed: f"{at}: {text}")


def test_what_was_dropped_may_change() -> None:
    x = torch.randn(6, 5).requires_grad_()
    given = x * 1
    out = F.dropout(given, 0.5)
    kept = out.detach() / x.detach()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(out.sum(), x, retain_graph=True)[0].sign(), kept.sign())
        with torch.no_grad():
            given.zero_()
