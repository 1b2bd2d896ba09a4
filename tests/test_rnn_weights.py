"""Which weights a recurrent layer uses: torch's answer, for every way of giving it others and every way through."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

import llmkern.nn as nn

I, H, B = 3, 4, 2
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def _hidden(module: Any) -> str:
    return "weight_hh_l0" if hasattr(module, "weight_hh_l0") else "weight_hh"


class Scaled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


class Functional(torch.nn.Module):
    """The module with other weights than its own."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = [module]
        with torch.no_grad():
            given = {name.replace(".", "-"): p * 0.5 + 0.1 for name, p in module.named_parameters()}
        self.given = torch.nn.ParameterDict(given)

    def forward(self, *args: Any) -> Any:
        given = {name.replace("-", "."): p for name, p in self.given.items()}
        return functional_call(self.module[0], given, args)


class Dropped(torch.nn.Module):
    """Weight dropping, as AWD-LSTM's code does it: a parameter becomes an attribute, made anew in every call."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.name = module, _hidden(module)
        self.raw = torch.nn.Parameter(module._parameters.pop(self.name).detach())

    def forward(self, *args: Any) -> Any:
        setattr(self.module, self.name, TF.dropout(self.raw, 0.25, False) * 0.75)
        return self.module(*args)


def _old_weight_norm(m: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(m, _hidden(m))


def _removed_weight_norm(m: Any) -> Any:
    return remove_weight_norm(_old_weight_norm(m), _hidden(m))


def _old_spectral_norm(m: Any) -> Any:
    return spectral_norm(m, _hidden(m))


def _weight_norm(m: Any) -> Any:
    return parametrizations.weight_norm(m, _hidden(m))


def _spectral_norm(m: Any) -> Any:
    return parametrizations.spectral_norm(m, _hidden(m))


def _orthogonal(m: Any) -> Any:
    return parametrizations.orthogonal(m, _hidden(m), "cayley", use_trivialization=False)


def _parametrised_twice(m: Any) -> Any:
    parametrize.register_parametrization(m, _hidden(m), Scaled())
    parametrize.register_parametrization(m, _hidden(m).replace("hh", "ih"), Scaled())
    return m


def _parametrised_and_back(m: Any) -> Any:
    _weight_norm(m)
    m(torch.randn(1, B, I)) if "Cell" not in type(m).__name__ else m(torch.randn(B, I))
    parametrize.remove_parametrizations(m, _hidden(m))
    return m


def _pruned(m: Any) -> Any:
    mask = torch.arange(getattr(m, _hidden(m)).numel()).reshape(-1, H) % 3 > 0
    return prune.custom_from_mask(m, _hidden(m), mask)


def _replaced(m: Any) -> Any:
    setattr(m, _hidden(m), torch.nn.Parameter(getattr(m, _hidden(m)).detach() * 2))
    return m


def _deleted_and_replaced(m: Any) -> Any:
    new = torch.nn.Parameter(getattr(m, _hidden(m)).detach() * 2)
    delattr(m, _hidden(m))
    setattr(m, _hidden(m), new)
    return m


def _in_parameters(m: Any) -> Any:
    m._parameters[_hidden(m)] = torch.nn.Parameter(getattr(m, _hidden(m)).detach() * 2)
    return m


def _swapped_data(m: Any) -> Any:
    getattr(m, _hidden(m)).data = getattr(m, _hidden(m)).data.t().contiguous().t() * 2
    return m


def _assigned(m: Any) -> Any:
    m.load_state_dict({name: p * 2 for name, p in m.state_dict().items()}, assign=True)
    return m


def _double(m: Any) -> Any:
    # There and back: other objects where torch makes them.
    return m.double().float()


def _tied_within(m: Any) -> Any:
    name = "weight_ih_l0" if hasattr(m, "weight_ih_l0") else "weight_ih"
    setattr(m, name, getattr(m, _hidden(m)))
    return m


def _tied_biases(m: Any) -> Any:
    name = "bias_ih_l0" if hasattr(m, "bias_ih_l0") else "bias_ih"
    setattr(m, name, getattr(m, name.replace("ih", "hh")))
    return m


def _frozen_bias(m: Any) -> Any:
    getattr(m, _hidden(m).replace("weight", "bias")).requires_grad_(False)
    return m


WAYS: dict[str, Callable[[Any], Any]] = {
    "old_weight_norm": _old_weight_norm,
    "removed_weight_norm": _removed_weight_norm,
    "old_spectral_norm": _old_spectral_norm,
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "orthogonal": _orthogonal,
    "parametrised_twice": _parametrised_twice,
    "parametrised_and_back": _parametrised_and_back,
    "pruned": _pruned,
    "functional_call": Functional,
    "weight_dropping": Dropped,
    "replaced": _replaced,
    "deleted_and_replaced": _deleted_and_replaced,
    "in_parameters": _in_parameters,
    "swapped_data": _swapped_data,
    "assigned": _assigned,
    "there_and_back": _double,
    "tied_biases": _tied_biases,
    "tied_within": _tied_within,
    "frozen_bias": _frozen_bias,
    "deepcopied": copy.deepcopy,
    "copy_of_parametrised": lambda m: copy.deepcopy(_weight_norm(m)),
}


def _flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in _flat(part)]


def build(package: Any, name: str, way: str) -> Any:
    torch.manual_seed(3)
    module = getattr(package, name)(H if way == "tied_within" else I, H)
    module(torch.randn(B, module.input_size)) if name in CELLS else module(torch.randn(1, B, module.input_size))
    return WAYS[way](module)


def call(f: Any, module: Any, name: str, way: str, states: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """Outputs and gradients, by name."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*((B,) if name in CELLS else (1, B)), H if way == "tied_within" else I, generator=g)
    h = torch.randn(*((B, H) if name in CELLS else (1, B, H)), generator=g)
    out = _flat(f(x, *([(h, h + 1) if "LSTM" in name else h] if states else [])))
    if not torch.is_grad_enabled():
        return out, {}
    module.zero_grad()
    sum(((i + 1) * t.square()).sum() for i, t in enumerate(out)).backward()  # type: ignore[union-attr]
    return out, {n: p.grad for n, p in module.named_parameters()}


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(ours[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_giving_other_weights_reaches_every_way_through(way: str, name: str) -> None:
    run(way, name)


def run(way, name, export=True):
    ours, theirs = build(nn, name, way), build(torch.nn, name, way)

    def both(f: Any, states: bool) -> None:
        same(call(f, ours, name, way, states), call(theirs, theirs, name, way, states))

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    both(ours, True)
    both(compiled, False)
    with torch.no_grad():
        both(ours, True)
        for m in (ours, theirs):
            for p in m.parameters():
                p.mul_(0.75)
        both(ours, True)
    both(compiled, False)
    both(ours, False)
