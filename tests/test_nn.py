"""``llmkern.nn`` stands in for ``torch.nn``: names, constructors, parameters, state, representation, pickling."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import llmkern.nn as nn

# A construction of each class that uses arguments beyond the required ones.
BUILD: dict[str, Any] = {
    "Embedding": lambda c: c(10, 3, padding_idx=2, max_norm=1.5, scale_grad_by_freq=True),
    "EmbeddingBag": lambda c: c(10, 3, mode="sum", include_last_offset=True, padding_idx=1),
    "RNN": lambda c: c(5, 7, 2, "relu", batch_first=True),
    "LSTM": lambda c: c(5, 7, 2, bidirectional=True, proj_size=3),
    "GRU": lambda c: c(5, 7, bias=False, bidirectional=True),
    "RNNCell": lambda c: c(5, 7, nonlinearity="relu"),
    "LSTMCell": lambda c: c(5, 7, bias=False),
    "GRUCell": lambda c: c(5, 7),
    "CrossEntropyLoss": lambda c: c(torch.arange(3.0), ignore_index=1, label_smoothing=0.1),
    "NLLLoss": lambda c: c(torch.arange(3.0), reduction="sum"),
    "LinearCrossEntropyLoss": lambda c: c(5, 7, bias=True, label_smoothing=0.1),
    "Linear": lambda c: c(5, 7, bias=False),
    "MSELoss": lambda c: c(reduction="sum"),
    "Dropout": lambda c: c(0.25, inplace=True),
    "LayerNorm": lambda c: c((3, 5), eps=0.1),
    "RMSNorm": lambda c: c(5, 0.1),
    "FusedEmbedding": lambda c: c(10, 4, num_positions=6, norm="layer", dropout=0.1),
    "QuantizedEmbedding": lambda c: c(10, 4, bits=4, padding_idx=1),
    "sLSTM": lambda c: c(5, 7, 2, bidirectional=True, num_heads=7),
}
OURS = [name for name in nn.__all__ if inspect.isclass(getattr(nn, name))]
# Options of ours beyond torch's, neutral by default.
_RECURRENT = {
    "clip",
    "zoneout",
    "weight_dropout",
    "variational_dropout",
    "num_heads",
    "layer_norm",
    "checkpoint_chunks",
    "state_dtype",
}
EXTRA = {
    "Embedding": {"row_grad"},
    "RNN": _RECURRENT,
    "GRU": _RECURRENT,
    "LSTM": {*_RECURRENT, "forget_bias", "peephole", "return_cell_states"},
    "CrossEntropyLoss": {"z_loss", "softcap", "logit_scale", "outputs", "inplace"},
    "LinearCrossEntropyLoss": {"z_loss", "softcap", "logit_scale", "outputs", "workspace"},
}


def _torch_class(name: str) -> Any:
    if not hasattr(torch.nn, name):
        pytest.skip(f"torch {torch.__version__} has no nn.{name}")
    return getattr(torch.nn, name)


def _both(name: str) -> tuple[Any, Any]:
    modules = []
    for cls in (getattr(nn, name), _torch_class(name)):
        torch.manual_seed(11)
        modules.append(BUILD[name](cls))
    return modules[0], modules[1]


def test_the_classes_are_all_tested() -> None:
    assert set(OURS) == set(BUILD)


def test_every_name_of_torch_nn_is_there() -> None:
    for name in [*torch.nn.modules.__all__, "functional", "init", "utils", "Parameter", "parameter"]:
        ours, theirs = getattr(nn, name), getattr(torch.nn, name)
        assert ours is theirs or name in OURS or name in ("functional", "utils"), name
    assert {"LSTM", "Linear", "Module"} <= set(dir(nn))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = nn.Nonsense


@pytest.mark.parametrize("module", ["functional", "init", "parameter", "utils", "utils.rnn", "utils.parametrizations"])
def test_submodules_import(module: str) -> None:
    ours, theirs = (importlib.import_module(f"{root}.{module}") for root in ("llmkern.nn", "torch.nn"))
    public = [name for name in dir(theirs) if not name.startswith("_")]
    assert all(hasattr(ours, name) for name in public)


@pytest.mark.parametrize("name", OURS)
def test_constructors_take_torchs_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (getattr(nn, name), _torch_class(name)))
    shared = {key: value for key, value in ours.items() if key not in EXTRA.get(name, set())}
    assert [(k, p.default, p.kind) for k, p in shared.items()] == [(k, p.default, p.kind) for k, p in theirs.items()]


@pytest.mark.parametrize("name", OURS)
def test_same_seed_same_parameters_and_state(name: str) -> None:
    ours, theirs = _both(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    changed = {key: value + 1 for key, value in theirs.state_dict().items()}
    ours.load_state_dict(changed)
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OURS)
def test_representation(name: str) -> None:
    ours, theirs = _both(name)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", OURS)
def test_copies(name: str) -> None:
    ours, _ = _both(name)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        for a, b in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr() or not a.numel()


@pytest.mark.parametrize("name", [n for n in OURS if "Loss" not in n and n not in ("Dropout", "QuantizedEmbedding")])
def test_device_and_dtype_arguments(name: str) -> None:
    module = getattr(nn, name)(5, 7, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
    assert len(list(module.parameters())) > 0


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_from_pretrained(name: str) -> None:
    table = torch.randn(6, 3)
    for frozen in (True, False):
        ours, theirs = (
            c.from_pretrained(table, freeze=frozen, padding_idx=1) for c in (getattr(nn, name), _torch_class(name))
        )
        assert type(ours) is getattr(nn, name)
        assert ours.weight.requires_grad is theirs.weight.requires_grad
        index = torch.tensor([[0, 1, 5]])
        torch.testing.assert_close(ours(index), theirs(index))


def test_a_model_with_one_import_changed() -> None:
    """The same model trained from the same seed over both namespaces ends at the same loss."""

    def train(ns: Any) -> list[float]:
        torch.manual_seed(0)
        embedding, lstm, linear = ns.Embedding(50, 8), ns.LSTM(8, 12, 2), ns.Linear(12, 50)
        model = ns.ModuleList([embedding, lstm, linear])
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        tokens = torch.randint(50, (9, 6), generator=torch.Generator().manual_seed(1))
        criterion, losses = ns.CrossEntropyLoss(), []
        for _ in range(60):
            optimizer.zero_grad()
            logits: Tensor = linear(lstm(embedding(tokens[:-1]))[0])
            loss = criterion(logits.flatten(0, 1), tokens[1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    ours, theirs = train(nn), train(torch.nn)
    assert ours[-1] < 0.7 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
