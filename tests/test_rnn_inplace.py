"""Arguments, weights and results of recurrent layers change between a forward and its backward: where torch is right so
are we, whichever gradients are wanted, and where torch refuses we refuse or are right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recurrent import tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern.nn as nn

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, projected": ("LSTM", {"proj_size": 3}),
    "LSTM, both directions": ("LSTM", {"bidirectional": True}),
    "GRU": ("GRU", {}),
    "GRU, both directions": ("GRU", {"bidirectional": True}),
    "RNN, tanh": ("RNN", {}),
    "RNN, relu": ("RNN", {"nonlinearity": "relu"}),
    "RNN, two layers": ("RNN", {"num_layers": 2}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {}),
}


class Run:
    """A call whose tensors can be changed before its gradients are asked for: those of ``wanted``."""

    def __init__(self, namespace: Any, name: str, form: str, wanted: set[str]) -> None:
        torch.manual_seed(1)
        kind, options = LAYERS[name]
        module = getattr(namespace, kind)(5, 7, **options).double()
        weights = dict(module.named_parameters())
        for key, weight in weights.items():
            weight.requires_grad_(key.split("_l")[0] in wanted)
        one_step = form == "cell"
        layers = () if one_step else (options.get("num_layers", 1) * (1 + options.get("bidirectional", False)),)
        shapes = {"x": () if one_step else (1 if form == "one step" else 2,), "hx": layers, "cx": layers}
        widths = {"x": 5, "hx": options.get("proj_size", 7), "cx": 7}
        names = ("x", "hx", "cx")[: 3 if "LSTM" in kind else 2]
        leaves = [torch.randn(*shapes[n], 2, widths[n]).double().requires_grad_(n in wanted) for n in names]
        x, *states = (leaf.clone() for leaf in leaves)
        given: Any = pack_padded_sequence(x, torch.tensor([2, 1])) if form == "packed" else x
        self.outputs = tensors(module(given, tuple(states) if "LSTM" in kind else states[0]))
        self.named = dict(weights, y=self.outputs[0], x=given.data if form == "packed" else x)
        self.named.update(zip(("hx", "cx"), states, strict=False))
        self.named.update(zip(("hy", "cy"), self.outputs[0 if one_step else 1 :], strict=False))
        self.leaves = [t for t in (*leaves, *weights.values()) if t.requires_grad]

    def change(self, name: str) -> None:
        with torch.no_grad():
            self.named[name].add_(1)

    def gradients(self) -> list[Tensor] | str:
        loss = sum(k * out.sum() for k, out in enumerate(self.outputs, 1))
        try:
            return list(torch.autograd.grad(loss, self.leaves, retain_graph=True))
        except RuntimeError as error:
            return str(error)


def _wanted(name: str) -> Iterator[set[str]]:
    """All gradients, and all but one; of plain layers also each alone, and those of all weights or of all else."""
    states = {"x", "hx", "cx"} if "LSTM" in name else {"x", "hx"}
    weights = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", *(["weight_hr"] if "projected" in name else [])}
    every = states | weights
    yield from (every, *(every - {one} for one in sorted(every)))
    if name != "LSTM, projected" and "," in name:
        return
    yield from (states, weights, *({one} for one in sorted(every)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_after_a_change_of_anything(name: str) -> None:
    forms = ("cell",) if name.endswith("Cell") else ("one step", "packed") if "," in name else ("one step", "steps")
    for form in forms:
        for wanted in _wanted(name):
            unchanged = Run(torch.nn, name, form, wanted)
            right = unchanged.gradients()
            for changed in unchanged.named:
                theirs, ours, at = (
                    Run(torch.nn, name, form, wanted),
                    Run(nn, name, form, wanted),
                    (form, wanted, changed),
                )
                # A second backward, so that the first finds nothing changed.
                if changed == "bias_hh":
                    torch.testing.assert_close(ours.gradients(), right)
                theirs.change(changed)
                ours.change(changed)
                expected, got = theirs.gradients(), ours.gradients()
                if isinstance(got, str):
                    assert "modified by an inplace operation" in got, at
                    assert isinstance(expected, str), at
                else:
                    torch.testing.assert_close(got, right, msg=lambda text, at=at: f"{at}: {text}")
