"""In-place work between a forward and its backward, and on results: where torch is right so are we, and where torch
refuses we refuse or are right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recurrent import tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern.functional as F
import llmkern.nn as nn

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, projected": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN, tanh": ("RNN", {}),
    "RNN, relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {}),
}
CHANGED = ("nothing", "y", "h", "c", "x", "hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Run:
    """A call whose tensors can be changed before its gradients are asked for."""

    def __init__(self, namespace: Any, name: str, frozen: str, steps: int, of_x: bool, of_states: bool) -> None:
        torch.manual_seed(1)
        kind, options = LAYERS[name]
        module = getattr(namespace, kind)(5, 7, **options).double()
        weights = {key.removesuffix("_l0"): p for key, p in module.named_parameters()}
        for key, weight in weights.items():
            weight.requires_grad_(frozen not in ("all", key))
        layers = () if kind.endswith("Cell") else (1,)
        steps_of = (steps,) if layers else ()
        leaves = [torch.randn(*steps_of, 2, 5).double().requires_grad_(of_x)]
        widths = (options.get("proj_size", 7), 7)[: 2 if "LSTM" in kind else 1]
        leaves += [torch.randn(*layers, 2, width).double().requires_grad_(of_states) for width in widths]
        x, *states = (leaf.clone() for leaf in leaves)
        self.outputs = tensors(module(x, tuple(states) if "LSTM" in kind else states[0]))
        final = self.outputs[0 if not layers else 1 :]
        self.named = {**weights, "y": self.outputs[0], "x": x, "hx": states[0], "h": final[0]}
        if len(states) > 1:
            self.named |= {"cx": states[1], "c": final[1]}
        self.leaves = [t for t in (*leaves, *weights.values()) if t.requires_grad]

    def change(self, name: str) -> None:
        if name in self.named:
            with torch.no_grad():
                self.named[name].add_(1)

    def gradients(self) -> list[Tensor] | str:
        cotangents = [torch.full_like(t, k + 1.0) for k, t in enumerate(self.outputs)]
        try:
            return list(torch.autograd.grad(self.outputs, self.leaves, cotangents, retain_graph=True))
        except RuntimeError as error:
            return str(error)


def _runs(name: str) -> Iterator[tuple[Any, ...]]:
    one = name.endswith("Cell")
    for steps, frozen in itertools.product((1,) if one else (1, 4), ("", "weight_ih", "weight_hh", "all")):
        for of_x, of_states in ((False, False), (True, True), (False, True)):
            if frozen != "all" or of_x or of_states:
                yield name, frozen, steps, of_x, of_states


# Of a GRU whose hidden weights are frozen torch has kept h - n; we read h.
def _reads_more(name: str, frozen: str, changed: str) -> bool:
    return "GRU" in name and frozen in ("weight_hh", "all") and changed == "hx"


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_of_a_recurrent_layer_after_a_change(name: str) -> None:
    for case in _runs(name):
        right = Run(torch.nn, *case).gradients()
        for changed in CHANGED:
            theirs, ours = Run(torch.nn, *case), Run(nn, *case)
            # A second backward, so that the first finds nothing changed.
            first = ours.gradients() if changed == "bias_hh" else right
            theirs.change(changed)
            ours.change(changed)
            expected, got = theirs.gradients(), ours.gradients()
            if isinstance(got, str):
                assert "modified by an inplace operation" in got, case
                assert isinstance(expected, str) or _reads_more(case[0], case[1], changed), (case, changed)
                continue
            torch.testing.assert_close(got, right, msg=lambda text, at=(case, changed): f"{at}: {text}")
            torch.testing.assert_close(first, right)


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
