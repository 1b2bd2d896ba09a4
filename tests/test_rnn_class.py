"""What class a recurrent layer is: torch's, for whoever asks, and one that the compiler takes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import llmkern.functional as F
import llmkern.nn as nn

I, H = 3, 4
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


class OwnLSTM(nn.LSTM):
    def __init__(self, size: int) -> None:
        super().__init__(size, H, batch_first=True)
        self.norm = torch.nn.LayerNorm(H)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return self.norm(output), states


class OwnTorchLSTM(torch.nn.LSTM):
    def __init__(self, size: int) -> None:
        super().__init__(size, H, batch_first=True)
        self.norm = torch.nn.LayerNorm(H)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return self.norm(output), states


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_a_recurrent_module_is_an_instance_of_torchs_class(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    module = ours(I, H)
    for copied in (module, copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is ours
        assert copied.__class__ is ours
        assert isinstance(copied, theirs)
        for other in {*LAYERS, *CELLS} - {name}:
            assert not isinstance(copied, getattr(torch.nn, other))
    assert issubclass(ours, theirs)
    assert theirs in ours.__mro__
    assert not isinstance(theirs(I, H), nn.sLSTM)


def test_an_slstm_is_a_recurrent_module_and_no_lstm() -> None:
    module = nn.sLSTM(I, H)
    assert isinstance(module, torch.nn.RNNBase)
    assert not isinstance(module, torch.nn.LSTM)


@pytest.mark.parametrize("name", LAYERS)
def test_initialisers_that_ask_for_torchs_class_find_ours(name: str) -> None:
    def initialise(module: torch.nn.Module) -> None:
        if isinstance(module, getattr(torch.nn, name)):
            for parameter in module.parameters():
                torch.nn.init.constant_(parameter, 0.25)

    model = torch.nn.Sequential(getattr(nn, name)(I, H)).apply(initialise)
    assert all(bool((p == 0.25).all()) for p in model.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_the_compiler_takes_ours_and_refuses_torchs_as_before(name: str) -> None:
    ours, theirs = getattr(nn, name)(I, H), getattr(torch.nn, name)(I, H)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, I)
    got = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)[0]
    torch.testing.assert_close(got, theirs(x)[0])
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(theirs, backend="aot_eager", fullgraph=True)(x)


def test_a_subclass_of_ours_works_eager_and_compiled() -> None:
    torch.manual_seed(1)
    ours = OwnLSTM(I)
    torch.manual_seed(1)
    theirs = OwnTorchLSTM(I)
    x = torch.randn(2, 5, I)
    for f in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(f(x)[0], theirs(x)[0])


def test_torchs_forward_takes_our_module() -> None:
    module, x = nn.LSTM(I, H), torch.randn(5, 2, I)
    torch.testing.assert_close(torch.nn.LSTM.forward(module, x)[0], module(x)[0])


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_errors_of_signatures_name_the_class(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    x = torch.randn(2, 2, I)
    calls: list[Any] = [
        lambda cls: cls(),
        lambda cls: cls(I),
        lambda cls: cls(I, H, colour=1),
        lambda cls: cls(I, H)(),
        lambda cls: cls(I, H)(x, None, None),
        lambda cls: cls(I, H)(x, state=None),
        lambda cls: cls(I, H)(x, None, hx=None),
    ]
    for call in calls:
        with pytest.raises(TypeError) as want:
            call(theirs)
        with pytest.raises(TypeError) as got:
            call(ours)
        assert str(got.value) == str(want.value)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells_compile_without_states_and_with_one_tensor_for_both(name: str, grad: bool) -> None:
    torch.manual_seed(6)
    cell = getattr(nn, name)(H, H)
    reference = getattr(torch.nn, name)(H, H)
    reference.load_state_dict(cell.state_dict())
    h = torch.randn(2, H, requires_grad=grad)
    pair = "LSTM" in name
    # The input is the state too.
    calls = [(h,), (h, (h, h) if pair else h), (h + 1, (h, h) if pair else h)]
    for arguments in calls:
        compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
        got, want = _tensor(compiled(*arguments)), _tensor(reference(*arguments))
        torch.testing.assert_close(got, want)
        if grad:
            grads = [
                torch.autograd.grad(y.square().sum(), [h, *m.parameters()]) for y, m in ((got, cell), (want, reference))
            ]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells_export_without_states(name: str, strict: bool) -> None:
    cell, x = getattr(nn, name)(I, H), torch.randn(2, I)
    program = torch.export.export(cell, (x,), strict=strict).module()
    torch.testing.assert_close(_tensor(program(x)), _tensor(cell(x)))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "sLSTM"])
def test_help_shows_every_argument_with_its_default(name: str) -> None:
    cls = getattr(nn, name)
    theirs = inspect.signature(torch.nn.RNNBase).parameters
    hidden = {"mode"} if name == "LSTM" else {"mode", "proj_size"}
    shown = inspect.signature(cls).parameters
    want = [p for p in theirs if p not in hidden]
    if name == "RNN":
        want.insert(3, "nonlinearity")
    assert list(shown)[: len(want)] == want
    assert all(shown[p].default == theirs[p].default for p in want if p in theirs)
    options = {*cls._OPTIONS, *cls._SHAPING} - ({"forget_bias", "peephole"} if name != "LSTM" else set())
    options -= {"return_cell_states"} if name in ("RNN", "GRU") else set()
    assert set(list(shown)[len(want) :]) == options
    assert all(shown[option].default == getattr(cls, option) for option in options)


def test_help_shows_the_arguments_of_functions() -> None:
    shown = inspect.signature(F.lstm).parameters
    assert list(shown)[:9] == (
        ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"]
    )
    assert {"zoneout": 0.0, "checkpoint_chunks": 1, "state_dtype": None}.items() <= {
        name: p.default for name, p in shown.items()
    }.items()


def test_a_subclass_shows_its_own_arguments() -> None:
    class Mine(nn.LSTM):
        def __init__(self, width: int, deep: bool = False) -> None:
            super().__init__(width, width, 2 if deep else 1)

    assert list(inspect.signature(Mine).parameters) == ["width", "deep"]
    assert Mine(3, deep=True).num_layers == 2
