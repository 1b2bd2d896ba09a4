"""llmkern may be imported again after its modules were purged, as notebooks, reloaders and plugin hosts do."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo import symbolic_convert

import llmkern
import llmkern.nn
import llmkern.optim
from llmkern.ops._library import define


def _loaded() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "llmkern"}


@pytest.fixture
def second() -> Iterator[Any]:
    """A second copy, beside the first."""
    first, finders = _loaded(), list(sys.meta_path)
    for name in first:
        del sys.modules[name]
    try:
        for name in ("nn", "optim", "functional", "native", "numpy", "reference"):
            importlib.import_module(f"llmkern.{name}")
        yield sys.modules["llmkern"]
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(first)
        sys.meta_path[:] = finders
        _forget_compiled()


def _forget_compiled() -> None:
    """The compiler keeps modules by name, in a cache and in the globals of what it compiled: these are the second
    copy's."""
    torch._dynamo.reset()
    cached = getattr(symbolic_convert, "_import_module", None)
    if hasattr(cached, "cache_clear"):
        cached.cache_clear()
    for module in list(sys.modules.values()):
        for name in [name for name in getattr(module, "__dict__", ()) if name.startswith("__import_llmkern")]:
            delattr(module, name)


def _losses(package: Any) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.ModuleList([package.nn.Embedding(9, 4), package.nn.LSTM(4, 4), package.nn.Linear(4, 9)])
    optimizer = package.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(4):
        tokens = torch.arange(8) % 5
        loss = package.nn.CrossEntropyLoss()(model[2](model[1](model[0](tokens))[0]), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_both_copies_work(second: Any) -> None:
    assert second is not llmkern
    assert second.nn.LSTM is not llmkern.nn.LSTM
    assert _losses(second) == _losses(llmkern)
    args = torch.randn(3, 5), torch.tensor([0, 4, 2])
    assert second.native.unavailable() == llmkern.native.unavailable()
    assert second.explain(second.functional.cross_entropy, *args).backends == ("native",)
    assert llmkern.explain(llmkern.functional.cross_entropy, *args).backends == ("native",)
    compiled = torch.compile(lambda *args: second.functional.cross_entropy(*args), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), torch.nn.functional.cross_entropy(*args))


def test_a_model_of_the_first_copy_runs_beside_the_second(second: Any) -> None:
    first = llmkern.nn.GRU(3, 4)
    moved = second.nn.GRU(3, 4)
    moved.load_state_dict(first.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(first(x)[0], moved(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(first)(x)[0], moved(x)[0], rtol=0, atol=0)
    assert isinstance(torch.nn.Linear(2, 2), second.nn.Linear)
    assert isinstance(torch.nn.Linear(2, 2), llmkern.nn.Linear)
    assert importlib.import_module("llmkern.nn.modules.rnn").LSTM is second.nn.LSTM


def test_parameters_are_loaded_as_those_of_the_copy_that_is_imported(second: Any) -> None:
    file = io.BytesIO()
    torch.save(second.nn.Embedding(5, 3, row_grad=True).weight, file)
    # torch knows of a function of each copy by one name, and takes any.
    for rebuild in (llmkern.ops._row_tensors._rebuild, second.ops._row_tensors._rebuild):
        file.seek(0)
        torch.serialization.add_safe_globals([rebuild])
        assert type(torch.load(file, weights_only=True)) is second.ops.RowParameter
        assert type(rebuild(torch.zeros(5, 3), True, {})) is second.ops.RowParameter


def test_each_tree_is_mounted_once(second: Any) -> None:
    assert sorted(f.mounted_at for f in sys.meta_path if hasattr(f, "mounted_at")) == ["llmkern.nn", "llmkern.optim"]


def test_ops_stay_when_a_copy_goes(second: Any) -> None:
    del second
    gc.collect()
    args = torch.randn(3, 5), torch.tensor([0, 4, 2])
    torch.testing.assert_close(llmkern.functional.cross_entropy(*args), torch.nn.functional.cross_entropy(*args))


def test_another_schema_of_the_same_op_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"llmkern::linear_forward: got a second version.*restart Python"):
        define("linear_forward(Tensor x) -> Tensor", lambda x: x)
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    torch.testing.assert_close(llmkern.functional.linear(x, w), x @ w.T)
