"""``torch.ao.quantization`` makes of a model of ours what it makes of torch's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao.quantization import (
    QuantWrapper,
    convert,
    default_dynamic_qconfig,
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    prepare_qat,
    quantize_dynamic,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import llmkern.nn as nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range:UserWarning")


@pytest.fixture(autouse=True)
def any_algorithm() -> Iterator[None]:
    """torch's quantised products have no deterministic one."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


IDS = torch.tensor([[1, 2], [9, 0], [4, 4], [7, 3]])


class Recurrent(torch.nn.Module):
    def __init__(self, ns: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.bag = ns.Embedding(10, 8), ns.EmbeddingBag(10, 8)
        self.lstm, self.gru = ns.LSTM(8, 6, 2, bidirectional=True), ns.GRU(12, 6)
        self.cells = ns.ModuleList([ns.LSTMCell(6, 6), ns.GRUCell(6, 6), ns.RNNCell(6, 6, nonlinearity="relu")])
        self.linear = ns.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.gru(self.lstm(self.embedding(ids))[0])[0][0]
        h = self.cells[0](y)[0]
        return self.linear(self.cells[2](h, self.cells[1](h)) + self.bag(ids)[:2, :6])


class Feedforward(torch.nn.Module):
    def __init__(self, ns: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = ns.Sequential(ns.Linear(8, 8), ns.ReLU(), ns.Dropout(0.1), ns.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _classes(model: torch.nn.Module) -> list[type]:
    """Of every module, ours by torch's name."""
    ours = {getattr(nn, name): getattr(torch.nn, name) for name in nn.__all__ if hasattr(torch.nn, name)}
    return [ours.get(type(m), type(m)) for m in model.modules()]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.float16},
        {"dtype": torch.quint8},
        {"qconfig_spec": {torch.nn.LSTM, torch.nn.Linear}},
        {"qconfig_spec": {nn.GRU, nn.LSTMCell}},
        {"qconfig_spec": {"linear": default_dynamic_qconfig, nn.LSTM: default_dynamic_qconfig}},
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_dynamic_quantisation(arguments: dict[str, Any], inplace: bool) -> None:
    spec = arguments.get("qconfig_spec", {})
    names = {getattr(key, "__name__", key): key for key in spec}
    theirs = type(spec)(getattr(torch.nn, str(name), name) for name in names) if isinstance(spec, set) else spec
    if isinstance(spec, dict):
        theirs = {getattr(torch.nn, str(name), name): spec[key] for name, key in names.items()}
    model, expected = Recurrent(nn), Recurrent(torch.nn)
    given = copy.deepcopy(model)
    made = quantize_dynamic(given, **arguments, inplace=inplace)
    expected = quantize_dynamic(expected, **(arguments | ({"qconfig_spec": theirs} if spec else {})))
    assert (made is given) is inplace
    assert _classes(made) == _classes(expected)
    assert _classes(made) != _classes(model)
    if arguments.get("dtype") != torch.quint8:
        torch.testing.assert_close(made(IDS), expected(IDS))
        assert (made(IDS) - model.eval()(IDS)).abs().max() > 0
    else:
        torch.testing.assert_close(made.embedding(IDS), expected.embedding(IDS))
        torch.testing.assert_close(made.bag(IDS), expected.bag(IDS))
    if not inplace:
        # The model that was given, and what was not to be converted, stay ours.
        assert type(given.linear) is nn.Linear
        assert all(
            type(m).__module__.startswith(("llmkern", "torch.ao")) for m in made.children() if m is not made.cells
        )


def test_hooks_and_parameters_stay() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    model[0].register_forward_hook(lambda *arguments: seen.append(arguments[2].shape))
    made = quantize_dynamic(model)
    made(torch.randn(2, 4))
    assert seen == [(2, 3)]
    assert type(made[0]) is torch.ao.nn.quantized.dynamic.Linear


def test_static_quantisation_and_training_for_it() -> None:
    x, results = torch.randn(5, 8), []
    for ns in (nn, torch.nn):
        model = QuantWrapper(Feedforward(ns).eval())
        model.qconfig = get_default_qconfig("fbgemm")  # type: ignore[assignment]
        prepared = prepare(model)
        prepared(x)
        made = convert(prepared)
        trained = QuantWrapper(Feedforward(ns).train())
        trained.qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        trained = prepare_qat(trained)
        torch.manual_seed(1)
        trained(x).sum().backward()
        results.append((_classes(made), made(x), _classes(trained), trained.module.layers[0].weight.grad))
    (classes, y, trained_classes, grad), expected = results
    assert classes == expected[0]
    torch.testing.assert_close(y, expected[1])
    assert trained_classes == expected[2]
    assert torch.ao.nn.qat.Linear in trained_classes
    assert grad.isfinite().all()


def test_layers_are_fused() -> None:
    for fuse in (fuse_modules, fuse_modules_qat):
        ours, theirs = (
            fuse(Feedforward(ns).train(fuse is fuse_modules_qat), ["layers.0", "layers.1"]) for ns in (nn, torch.nn)
        )
        assert _classes(ours) == _classes(theirs)
        assert type(ours.layers[0]) is torch.ao.nn.intrinsic.LinearReLU
        x = torch.randn(5, 8)
        torch.testing.assert_close(ours.layers[0](x), theirs.layers[0](x))


def test_quantisation_of_graphs() -> None:
    x, results = torch.randn(5, 8), []
    for ns in (nn, torch.nn):
        prepared = prepare_fx(Feedforward(ns).eval(), get_default_qconfig_mapping("fbgemm"), (x,))
        prepared(x)
        results.append(convert_fx(prepared)(x))
    torch.testing.assert_close(*results)
    assert (results[0] - Feedforward(nn).eval()(x)).abs().max() > 0


def test_what_torch_has_not_stays_and_says_so() -> None:
    model = nn.Sequential(nn.GRU(4, 4, clip=0.5), nn.GRU(4, 4))
    with pytest.warns(UserWarning, match=r"got GRU\(4, 4, clip=0.5\), with options that GRU of torch does not have"):
        made = quantize_dynamic(model)
    assert [type(m) for m in made] == [nn.GRU, torch.ao.nn.quantized.dynamic.GRU]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantize_dynamic(nn.Sequential(nn.QuantizedEmbedding(4, 4), nn.MSELoss()))


def test_subclasses_stay_as_torchs_do() -> None:
    for ns in (nn, torch.nn):
        mine = type("Mine", (ns.Linear,), {})
        assert type(quantize_dynamic(ns.Sequential(mine(4, 3)))[0]) is mine
