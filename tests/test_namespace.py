"""torch's modules below ``torch.nn`` and ``torch.optim`` under our names, and torch's instances under our classes."""

from __future__ import annotations

import abc
import copy
import functools
import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import pytest
import torch
import torch.nn.utils.parametrizations
from torch import Tensor

import llmkern
import llmkern.nn as nn
import llmkern.optim as optim

T = TypeVar("T")
ROOTS = ((torch.nn, nn), (torch.optim, optim))
# torch's objects, and ours in their places.
REPLACED = {
    **{getattr(torch.nn, n): getattr(nn, n) for n in nn.__all__ if inspect.isclass(getattr(torch.nn, n, None))},
    **{getattr(torch.optim, n): getattr(optim, n) for n in optim.__all__ if hasattr(torch.optim, n)},
    torch.nn.utils.clip_grad_norm_: optim.clip_grad_norm_,
}
CLASSES = [(theirs, ours) for theirs, ours in REPLACED.items() if inspect.isclass(ours)]


def _tree() -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for theirs, ours in ROOTS:
            for module in pkgutil.walk_packages(theirs.__path__, theirs.__name__ + "."):
                yield module.name, ours.__name__ + module.name.removeprefix(theirs.__name__)


def _expected(theirs: ModuleType, name: str) -> Any:
    value = getattr(theirs, name)
    return REPLACED.get(value, value) if isinstance(value, type) or inspect.isfunction(value) else value


def test_every_module_of_torch_is_there_and_is_torchs_but_for_what_we_replace() -> None:
    different, names = set(), list(_tree())
    assert len(names) > 140
    for torchs, name in names:
        theirs, ours = importlib.import_module(torchs), importlib.import_module(name)
        assert importlib.util.find_spec(name) is not None
        if ours is theirs or name == "llmkern.nn.functional":
            continue
        different.add(name)
        public = getattr(theirs, "__all__", ())
        for attribute in dir(theirs):
            value = getattr(ours, attribute)
            if attribute in public:
                assert value is _expected(theirs, attribute), (name, attribute)
            elif not attribute.startswith("__") and not inspect.ismodule(value):
                assert value in (getattr(theirs, attribute), _expected(theirs, attribute)), (name, attribute)
        assert set(dir(theirs)) <= set(dir(ours))
    # Those that make public what we replace, and no others.
    homes = {theirs.__module__ for theirs in REPLACED} | {"torch.nn.modules", "torch.nn.utils"}
    assert different == {"llmkern" + home.removeprefix("torch") for home in homes}


def test_no_file_of_torch_is_executed_twice() -> None:
    for _, name in _tree():
        importlib.import_module(name)
    modules = {id(m): m for n, m in sys.modules.items() if n.startswith(("torch.nn", "torch.optim", "llmkern"))}
    files = Counter(file for m in modules.values() if (file := vars(m).get("__file__")) and "/torch/" in file)
    assert max(files.values()) == 1
    assert importlib.import_module("llmkern.nn.modules.module").Module is torch.nn.Module
    assert importlib.import_module("llmkern.optim.optimizer").Optimizer is torch.optim.Optimizer


def test_imports_leave_torchs_functions_of_the_same_name() -> None:
    """``import torch.nn.utils.weight_norm`` is a module; ``torch.nn.utils.weight_norm`` is a function."""
    for path in ("utils.weight_norm", "utils.spectral_norm", "parallel.replicate", "parallel.data_parallel"):
        theirs, ours = (importlib.import_module(f"{root}.{path}") for root in ("torch.nn", "llmkern.nn"))
        assert ours is theirs
        package, _, name = path.partition(".")
        function = getattr(getattr(nn, package), name)
        assert inspect.isfunction(function)
        assert function is getattr(getattr(torch.nn, package), name)


def test_import_statements() -> None:
    import llmkern.nn.modules.rnn as rnn
    import llmkern.nn.utils.parametrize as P
    from llmkern.nn.modules import LSTM, Module
    from llmkern.nn.modules.rnn import LSTM as same
    from llmkern.nn.utils.clip_grad import clip_grad_norm_, clip_grad_value_
    from llmkern.optim.adamw import AdamW

    import llmkern.optim.adam as adam

    assert P is torch.nn.utils.parametrize
    assert LSTM is same is nn.LSTM is rnn.LSTM is nn.modules.rnn.LSTM
    assert Module is torch.nn.Module
    assert rnn.RNNBase is torch.nn.RNNBase
    assert clip_grad_norm_ is nn.utils.clip_grad_norm_ is optim.clip_grad_norm_
    assert clip_grad_value_ is torch.nn.utils.clip_grad_value_
    assert AdamW is optim.AdamW
    assert adam.adam is importlib.import_module("torch.optim.adam").adam
    assert adam._multi_tensor_adam is importlib.import_module("torch.optim.adam")._multi_tensor_adam
    names: dict[str, Any] = {}
    exec("from llmkern.nn.modules.rnn import *", names)
    assert names["GRU"] is nn.GRU
    assert names["RNNBase"] is torch.nn.RNNBase


@pytest.mark.parametrize("name", ["llmkern.nn.modules.rnn", "llmkern.nn.modules", "llmkern.optim.adamw"])
def test_a_stand_in_reloads_in_place(name: str) -> None:
    module = importlib.import_module(name)
    public = {n: getattr(module, n) for n in module.__all__}
    assert importlib.reload(module) is module
    assert {n: getattr(module, n) for n in module.__all__} == public


def test_what_torch_has_not_is_an_import_error() -> None:
    for name in ("llmkern.nn.nonsense", "llmkern.nn.modules.nonsense", "llmkern.optim.nonsense"):
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)
        assert importlib.util.find_spec(name) is None
    # Ours is a package; torch's is not, and our files are not to be executed under another name.
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("llmkern.nn.functional.linear")


def test_a_process_may_begin_with_any_of_the_modules() -> None:
    code = """
        from llmkern.nn.modules.rnn import LSTM, RNNBase
        import sys
        assert not {"torch._dynamo", "torch.nn.utils.prune"} & {*sys.modules}
        import llmkern.nn.quantized.modules.linear, llmkern.optim._multi_tensor
        import torch, torch.nn.quantized.modules.linear as linear
        assert sys.modules["llmkern.nn.quantized.modules.linear"] is linear is llmkern.nn.quantized.modules.linear
        assert RNNBase is torch.nn.RNNBase and LSTM is llmkern.nn.LSTM
        # Loaded by torch first; then under our name.
        import torch.nn.utils.prune, llmkern.nn.utils.prune
        assert llmkern.nn.utils.prune is torch.nn.utils.prune
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], check=True, timeout=120)


# A construction of each replaced class.
BUILD: dict[str, Any] = {
    "LayerNorm": (2,),
    "RMSNorm": (2,),
    **dict.fromkeys(("Linear", "Embedding", "EmbeddingBag", "LSTM", "GRU", "RNN"), (4, 3)),
    **dict.fromkeys(("LSTMCell", "GRUCell", "RNNCell", "LinearCrossEntropyLoss"), (4, 3)),
    **dict.fromkeys(("CrossEntropyLoss", "NLLLoss", "MSELoss", "Dropout"), ()),
}


def _build(cls: type) -> Any:
    if issubclass(cls, torch.optim.Optimizer):
        return cls([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    return cls(*next(BUILD[base.__name__] for base in cls.__mro__ if base.__name__ in BUILD))


@pytest.mark.parametrize(("theirs", "ours"), CLASSES, ids=lambda c: c.__qualname__)
def test_torchs_instances_are_ours_and_no_subclass_claims_them(theirs: type, ours: type) -> None:
    module = _build(theirs)
    mine = type("Mine", (ours,), {})
    other = type("Theirs", (theirs,), {})
    assert isinstance(module, ours)
    assert isinstance(_build(ours), ours)
    assert isinstance(_build(other), ours)
    assert isinstance(_build(mine), (ours, mine))
    assert issubclass(theirs, ours)
    assert issubclass(mine, ours)
    assert not isinstance(module, mine)
    assert not isinstance(_build(ours), mine)
    assert not issubclass(theirs, mine)
    assert not isinstance(torch.nn.ReLU(), ours)
    for strange in {c for _, c in CLASSES} - {ours}:
        assert isinstance(module, strange) == isinstance(module, next(t for t, o in CLASSES if o is strange))


def test_apply_finds_the_layers_that_torchs_modules_made() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)

    def initialise(m: torch.nn.Module) -> None:
        if isinstance(m, nn.Linear):
            torch.nn.init.zeros_(m.weight)

    layer.apply(initialise)
    assert not layer.linear1.weight.any()
    assert not layer.linear2.weight.any()
    assert not layer.self_attn.out_proj.weight.any()
    assert [type(m).__name__ for m in layer.modules() if isinstance(m, nn.Dropout)] == ["Dropout"] * 3


class _Countable(Protocol):
    def count(self) -> int: ...


class _Registering(abc.ABCMeta):
    pass


class _Abstract(nn.Linear, abc.ABC):
    @abc.abstractmethod
    def count(self) -> int: ...


class _First(abc.ABC, nn.LSTM):
    pass


class _Concrete(_Abstract):
    def count(self) -> int:
        return self.weight.numel()


class _Generic(nn.Linear, Generic[T]):
    pass


class _Declared(nn.Linear, metaclass=abc.ABCMeta):
    pass


class _Registered(nn.Linear, metaclass=_Registering):
    pass


class _Structural(nn.Linear, _Countable):
    def count(self) -> int:
        return 1


class _Optimizer(optim.Adam, abc.ABC):
    pass


@pytest.mark.parametrize("cls", [_Concrete, _Generic, _Declared, _Registered, _Structural])
def test_user_classes_with_abc_generic_and_protocols(cls: Any) -> None:
    module = cls(4, 3)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is cls
        assert isinstance(other, (nn.Linear, torch.nn.Linear))
        x = torch.randn(2, 4)
        torch.testing.assert_close(other(x), torch.nn.functional.linear(x, module.weight, module.bias))
    assert not isinstance(torch.nn.Linear(4, 3), cls)


def test_abstract_classes_of_ours_stay_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        _Abstract(4, 3)  # type: ignore[abstract]
    assert _First(4, 3)(torch.zeros(1, 1, 4))[0].shape == (1, 1, 3)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    _Optimizer([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.5))


def test_single_dispatch_takes_torchs_layers_for_ours() -> None:
    @functools.singledispatch
    def name(module: object) -> str:
        return "other"

    @name.register
    def _(module: nn.Linear) -> str:
        return "linear"

    assert [name(m) for m in (nn.Linear(1, 1), torch.nn.Linear(1, 1), _Concrete(1, 1), torch.nn.ReLU())] == [
        *["linear"] * 3,
        "other",
    ]


def test_parametrised_layers_are_ours_still() -> None:
    for cls in (nn.Linear, torch.nn.Linear):
        layer = torch.nn.utils.parametrizations.weight_norm(cls(4, 3))
        assert isinstance(layer, nn.Linear)
        assert isinstance(layer, torch.nn.Linear)


def test_the_compiler_follows_isinstance() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), torch.nn.Linear(4, 4), nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if isinstance(layer, nn.Linear) and issubclass(type(layer), nn.Linear):
                    x = 2 * layer(x)
                elif isinstance(layer, (nn.LSTM, nn.Dropout)):
                    x = x * torch.nan
            return x

    model, x = Model(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = 4 * torch.nn.functional.linear(
        torch.nn.functional.linear(x, model.layers[0].weight, model.layers[0].bias),
        model.layers[1].weight,
        model.layers[1].bias / 2,
    )
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_names_of_torch_resolve_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = object()
    for theirs, ours in ((torch.nn, nn), (torch.nn.functional, llmkern.functional), (torch.optim, optim)):
        monkeypatch.setattr(theirs, "a_new_name", marker, raising=False)
        assert ours.a_new_name is marker
    monkeypatch.setattr(importlib.import_module("torch.nn.modules.rnn"), "a_new_name", marker, raising=False)
    assert nn.modules.rnn.a_new_name is marker
