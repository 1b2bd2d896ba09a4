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


# What compiling takes seconds to show: each way with one class.
COMPILED = [
    ("old_weight_norm", "GRU"),
    ("old_spectral_norm", "RNNCell"),
    ("weight_norm", "LSTM"),
    ("spectral_norm", "RNN"),
    ("orthogonal", "GRUCell"),
    ("parametrised_and_back", "LSTM"),
    ("pruned", "RNN"),
    ("functional_call", "LSTM"),
    ("functional_call", "LSTMCell"),
    ("weight_dropping", "GRU"),
    ("deleted_and_replaced", "GRU"),
    ("swapped_data", "LSTM"),
    ("assigned", "RNN"),
    ("tied_biases", "GRU"),
    ("tied_within", "LSTM"),
    ("copy_of_parametrised", "GRU"),
]


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("way", "name"), COMPILED)
def test_other_weights_reach_every_way_through(way: str, name: str) -> None:
    ours, theirs = build(nn, name, way), build(torch.nn, name, way)

    def both(f: Any, states: bool) -> None:
        same(call(f, ours, name, way, states), call(theirs, theirs, name, way, states))

    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    both(ours, True)
    both(compiled, False)
    with torch.no_grad():
        # The second time the short way of a step.
        both(ours, True)
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.mul_(0.75)
        both(ours, True)
    both(compiled, False)
    both(ours, False)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
@pytest.mark.parametrize("way", WAYS)
def test_other_weights_reach_eager_calls_of_every_class(way: str, name: str) -> None:
    ours, theirs = build(nn, name, way), build(torch.nn, name, way)
    for states in (False, True):
        same(call(ours, ours, name, way, states), call(theirs, theirs, name, way, states))
        with torch.no_grad():
            same(call(ours, ours, name, way, states), call(theirs, theirs, name, way, states))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("way", "name"), [("weight_norm", "LSTM"), ("functional_call", "GRU"), ("tied_biases", "LSTM"), ("pruned", "RNN")]
)
def test_other_weights_reach_exported_programs(way: str, name: str, strict: bool) -> None:
    ours, theirs = build(nn, name, way), build(torch.nn, name, way)
    if way == "functional_call":
        # What it calls must be part of the program.
        ours.inner = ours.module[0]
    program = torch.export.export(ours, (torch.randn(1, B, I),), strict=strict).module()
    (got, _), (want, _) = (call(f, m, name, way, False) for f, m in ((program, ours), (theirs, theirs)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _by_hand(package: Any, name: str) -> Any:
    torch.manual_seed(5)
    module = getattr(package, name)(I, H)
    module._flat_weights = [torch.nn.Parameter(w.detach() * 3) for w in module._flat_weights]
    return module


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_flat_weights_set_by_hand_serve_training_and_decoding(name: str) -> None:
    ours, theirs = _by_hand(nn, name), _by_hand(torch.nn, name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for f in (ours, compiled):
        for states in (False, True):
            got, want = (call(g, m, name, "", states) for g, m in ((f, ours), (theirs, theirs)))
            same(got, want)
            assert all(grad is None for grad in got[1].values())
            for a, b in zip(ours._flat_weights, theirs._flat_weights, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        same(call(ours, ours, name, "", True), call(theirs, theirs, name, "", True))
        for module in (ours, theirs):
            # One parameter is replaced: all of them serve again.
            module.weight_ih_l0 = torch.nn.Parameter(module.weight_ih_l0 * 2)
        same(call(ours, ours, name, "", True), call(theirs, theirs, name, "", True))
    same(call(compiled, ours, name, "", False), call(theirs, theirs, name, "", False))


@pytest.mark.parametrize("name", ["LSTM"])
def test_nothing_of_a_functional_call_stays(name: str) -> None:
    torch.manual_seed(2)
    module, x = getattr(nn, name)(I, H), torch.randn(3, B, I)
    others = {n: p.detach() * 2 for n, p in module.named_parameters()}
    plain = [t.detach() for t in _flat(module(x))]

    def function(x: Tensor) -> Any:
        return functional_call(module, others, (x,))

    different = [t.detach() for t in _flat(function(x))]
    compiled, inner = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (module, function))
    for f, want in (
        (compiled, plain),
        (inner, different),
        (compiled, plain),
        (module, plain),
        (function, different),
    ) * 2:
        torch.testing.assert_close(_flat(f(x)), want, rtol=1e-5, atol=1e-6)
    same_objects = [a is b for a, b in zip(copy.deepcopy(module)._flat_weights, module.parameters(), strict=True)]
    assert not any(same_objects)
    module(x)
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))


@pytest.mark.parametrize("name", ["GRU"])
def test_weights_of_another_dtype_are_checked_as_given(name: str) -> None:
    module = getattr(nn, name)(I, H)
    others = {n: p.detach().double() for n, p in module.named_parameters()}
    x = torch.randn(3, B, I, dtype=torch.float64)

    def function(x: Tensor) -> Any:
        return functional_call(module, others, (x,))

    want = _flat(copy.deepcopy(module).double()(x))
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(_flat(f(x)), [t.detach() for t in want])


@pytest.mark.parametrize("name", ["LSTM"])
def test_one_weight_in_several_places_has_the_sum_of_its_gradients(name: str) -> None:
    def make(package: Any) -> Any:
        torch.manual_seed(4)
        first, second = (getattr(package, name)(H, H, num_layers=2) for _ in range(2))
        first.weight_hh_l1 = first.weight_hh_l0
        second.weight_ih_l0, second.bias_hh_l1 = first.weight_ih_l0, first.bias_ih_l0
        return torch.nn.ModuleList([first, second])

    ours, theirs = make(nn), make(torch.nn)
    x = torch.randn(3, B, H)

    def results(f: Any, m: Any) -> Any:
        y = f(x)
        m.zero_grad()
        y.square().sum().backward()
        return [y], {n: p.grad for n, p in m.named_parameters()}

    want = results(lambda x: theirs[1](theirs[0](x)[0])[0], theirs)

    def function(x: Tensor) -> Tensor:
        return ours[1](ours[0](x)[0])[0]

    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        same(results(f, ours), want)
