"""torch's protocols for functions: subclasses and modes are asked as torch asks them; torch's names may be patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import llmkern
import llmkern.functional as F
import llmkern.nn as nn
import llmkern.optim as optim

VF = torch._VF
W = [torch.randn(s, generator=torch.Generator().manual_seed(3)) for s in ((12, 4), (12, 3), (12,), (12,))]
STATE = torch.randn(1, 2, 3)
BAGS = (torch.tensor([0, 2, 1, 0]), torch.randn(5, 3), torch.tensor([0, 2]))


class Case(NamedTuple):
    """A function of ours, torch's (``None``: torch has none), and arguments."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012


def _rows(gates: int) -> list[Tensor]:
    return [w[: 3 * gates] for w in W]


T = torch.nn.functional
LOGITS, LABELS = torch.randn(4, 5), torch.tensor([0, 2, 4, 1])
CASES = {
    "linear": Case(F.linear, T.linear, (torch.randn(2, 4), W[0], W[2])),
    "layer_norm": Case(F.layer_norm, T.layer_norm, (torch.randn(2, 4), (4,), torch.randn(4), torch.randn(4))),
    "rms_norm": Case(F.rms_norm, T.rms_norm, (torch.randn(2, 4), (4,), torch.randn(4)), {"eps": 0.1}),
    "dropout": Case(F.dropout, T.dropout, (torch.randn(40), 0.0)),
    "embedding": Case(F.embedding, T.embedding, (torch.tensor([2, 0]), torch.randn(5, 3)), {"padding_idx": 1}),
    "embedding_bag": Case(F.embedding_bag, T.embedding_bag, BAGS, {"mode": "sum"}),
    "mse_loss": Case(F.mse_loss, T.mse_loss, (torch.randn(4), torch.randn(4)), {"reduction": "sum"}),
    "cross_entropy": Case(F.cross_entropy, T.cross_entropy, (LOGITS, LABELS, torch.rand(5)), {"label_smoothing": 0.1}),
    "nll_loss": Case(F.nll_loss, T.nll_loss, (LOGITS, LABELS, torch.rand(5)), {"reduction": "sum"}),
    "lstm": Case(F.lstm, VF.lstm, (torch.randn(5, 2, 4), (STATE, STATE), _rows(4), True, 1, 0.0, False, False, False)),
    "gru": Case(F.gru, VF.gru, (torch.randn(5, 2, 4), STATE, _rows(3), True, 1, 0.0, False, False, False)),
    "rnn_tanh": Case(
        F.rnn_tanh, VF.rnn_tanh, (torch.randn(5, 2, 4), STATE, _rows(1), True, 1, 0.0, False, False, False)
    ),
    "rnn_relu": Case(
        F.rnn_relu, VF.rnn_relu, (torch.randn(5, 2, 4), STATE, _rows(1), True, 1, 0.0, False, False, False)
    ),
    "lstm_cell": Case(F.lstm_cell, VF.lstm_cell, (torch.randn(2, 4), (STATE[0], STATE[0]), *_rows(4))),
    "gru_cell": Case(F.gru_cell, VF.gru_cell, (torch.randn(2, 4), STATE[0], *_rows(3))),
    "rnn_tanh_cell": Case(F.rnn_tanh_cell, VF.rnn_tanh_cell, (torch.randn(2, 4), STATE[0], *_rows(1))),
    "rnn_relu_cell": Case(F.rnn_relu_cell, VF.rnn_relu_cell, (torch.randn(2, 4), STATE[0], *_rows(1))),
    # What torch does not have is asked about under our function.
    "z_loss": Case(F.cross_entropy, None, (LOGITS, LABELS), {"z_loss": 0.1, "outputs": ("lse",)}),
    "weighted mean": Case(F.embedding_bag, None, BAGS, {"per_sample_weights": torch.rand(4)}),
    "clip": Case(
        F.gru, None, (torch.randn(5, 2, 4), STATE, _rows(3), True, 1, 0.0, False, False, False), {"clip": 0.5}
    ),
    "slstm": Case(
        F.slstm,
        None,
        (torch.randn(5, 2, 4), (STATE, STATE.repeat(1, 1, 3)), _rows(4), True, 1, 0.0, False, False, False),
    ),
    "fused_embedding": Case(F.fused_embedding, None, (LABELS, torch.randn(5, 3), torch.randn(9, 3)), {"scale": 2.0}),
    "quantize_rows": Case(F.quantize_rows, None, (torch.randn(5, 3),)),
    "quantized_embedding": Case(F.quantized_embedding, None, (LABELS, *F.quantize_rows(torch.randn(5, 3)))),
}
# torch's has no protocol of its own: the functions that it is composed of ask.
COMPOSED = {"linear_cross_entropy"}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _tensors(values: Any) -> Iterator[tuple[Any, ...]]:
    """The places of tensors in nested arguments."""
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            yield (i,)
        elif isinstance(value, (list, tuple)):
            yield from ((i, *rest) for rest in _tensors(value))


def _replaced(values: Any, place: tuple[Any, ...], by: Callable[[Tensor], Tensor]) -> Any:
    head, *rest = place
    new = _replaced(values[head], tuple(rest), by) if rest else by(values[head])
    return type(values)([new if i == head else value for i, value in enumerate(values)])


class Asked(Tensor):
    """Answers every function with what it was asked."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, tuple(types), args, kwargs or {}


class Plain(Tensor):
    """A subclass that overrides nothing."""


class Log(TorchFunctionMode):
    def __init__(self) -> None:
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_all_public_functions_are_tested() -> None:
    tested = {case.ours.__name__ for case in CASES.values()} | COMPOSED
    assert tested == {n for n in F.__all__ if n not in ("CrossEntropyOutput", "clip_grad_norm_")}


@EACH
def test_a_subclass_in_any_place_is_asked_as_torch_asks(case: Case) -> None:
    for place in _tensors(case.args):
        args = _replaced(case.args, place, lambda t: t.as_subclass(Asked))
        function, types, given, kwargs = case.ours(*args, **case.kwargs)
        if case.theirs is None:
            assert function is case.ours
            assert Asked in types
        else:
            expected = case.theirs(*args, **case.kwargs)
            assert function is expected[0]
            assert types == expected[1]
            assert Asked in types
            assert kwargs.keys() == expected[3].keys()
            assert len(given) == len(expected[2])


@EACH
def test_a_subclass_without_an_override_gives_what_it_gives_in_torch(case: Case) -> None:
    expected = case.ours(*case.args, **case.kwargs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for place in _tensors(case.args):
        args = _replaced(case.args, place, lambda t: t.as_subclass(Plain))
        got = case.ours(*args, **case.kwargs)
        for one, other in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            if other is not None:
                assert type(one) is Plain
                torch.testing.assert_close(one.as_subclass(Tensor), other)


@EACH
def test_a_mode_is_asked_once_and_sees_torchs_function(case: Case) -> None:
    with Log() as log:
        got = case.ours(*case.args, **case.kwargs)
    if case.theirs is None:
        assert log.functions == [case.ours]
    else:
        with Log() as theirs:
            case.theirs(*case.args, **case.kwargs)
        assert log.functions == theirs.functions
        assert len(log.functions) == 1
    torch.testing.assert_close(got, case.ours(*case.args, **case.kwargs))


def test_linear_cross_entropy_is_asked_about_in_its_parts() -> None:
    args = torch.randn(4, 3), torch.randn(5, 3), LABELS
    with Log() as log:
        F.linear_cross_entropy(*args)
    assert [f for f in log.functions if f in (T.linear, T.cross_entropy)] == [T.linear, T.cross_entropy]
    got = F.linear_cross_entropy(args[0].as_subclass(Plain), *args[1:])
    assert type(got) is Plain
    torch.testing.assert_close(got.as_subclass(Tensor), F.linear_cross_entropy(*args))


def test_modules_ask_too_and_a_mode_can_take_over() -> None:
    class Zeros(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return torch.zeros(()) if func is T.cross_entropy else func(*args, **(kwargs or {}))

    with Zeros():
        assert nn.CrossEntropyLoss()(LOGITS, LABELS) == 0
    with torch.no_grad(), Log() as log:
        nn.LSTMCell(4, 3)(torch.randn(2, 4), (STATE[0], STATE[0]))
        nn.GRU(4, 3)(torch.randn(1, 2, 4), STATE)
    assert log.functions.count(torch.lstm_cell) == log.functions.count(torch.gru) == 1


def test_derivatives_pass_through_a_subclass() -> None:
    x = LOGITS.clone().requires_grad_()
    F.cross_entropy(x.as_subclass(Plain), LABELS).backward()
    expected = torch.autograd.functional.jacobian(lambda z: T.cross_entropy(z, LABELS), LOGITS)
    torch.testing.assert_close(x.grad, expected)


def test_a_default_device_leaves_kernels_on() -> None:
    for case in (CASES["cross_entropy"], CASES["embedding"], CASES["lstm"]):
        with torch.device("cpu"):
            given = llmkern.explain(case.ours, *case.args, **case.kwargs)
            assert given.backends == llmkern.explain(case.ours, *case.args, **case.kwargs).backends != ("torch",)
        with torch.device("cpu"), Log():
            assert llmkern.explain(case.ours, *case.args, **case.kwargs).backends == ("torch",)


def test_explain_says_who_was_asked() -> None:
    told = llmkern.explain(F.cross_entropy, LOGITS.as_subclass(Plain), LABELS)
    assert told.backends == ("torch",)
    assert "__torch_function__" in str(told)


def test_compiled_code_asks_modes_too() -> None:
    def function(x: Tensor) -> Tensor:
        return F.cross_entropy(x, LABELS) + F.linear(x, x).sum()

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    expected = function(LOGITS)
    torch.testing.assert_close(compiled(LOGITS), expected)
    with torch.device("cpu"):
        torch.testing.assert_close(compiled(LOGITS), expected)


# --- torch's names, patched with ours ---------------------------------------------------------------------------------


@contextmanager
def _patched() -> Iterator[None]:
    """Everything that we replace, in torch's place, as people patch closed code."""
    with pytest.MonkeyPatch.context() as patch:
        for name in F.__all__:
            homes: list[Any] = [torch.nn.functional, torch.nn.utils]
            # Elsewhere other functions have such names.
            homes += [torch._VF, torch] if name.startswith(("lstm", "gru", "rnn", "dropout")) else []
            for home in homes:
                if hasattr(home, name):
                    patch.setattr(home, name, getattr(F, name))
        for ours, theirs in ((nn, torch.nn), (optim, torch.optim)):
            for name in ours.__all__:
                if isinstance(getattr(theirs, name, None), type):
                    patch.setattr(theirs, name, getattr(ours, name))
        yield


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_fallbacks_hold_torchs_functions(backend: str) -> None:
    """Odd arguments, which torch serves, and all of torch's functions by force."""
    odd = {
        "linear": [(torch.randn(3, 4).cfloat(), torch.randn(2, 4).cfloat())],
        "embedding": [(torch.tensor([1]), torch.randn(3, 2).cfloat())],
    }
    for name, case in CASES.items():
        if case.theirs is None:
            continue
        calls = [(case.args, case.kwargs)] + [(args, {}) for args in odd.get(name, ()) if backend == "auto"]
        for args, kwargs in calls:
            expected = case.theirs(*args, **kwargs)
            with llmkern.backend(backend if name != "nll_loss" else "auto"), _patched():
                for function in (case.ours, getattr(torch.nn.functional, name, case.ours)):
                    torch.testing.assert_close(function(*args, **kwargs), expected)


def test_patched_models_train_as_before() -> None:
    def train(ns: Any, optimizer: Any, clip: Any) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.ModuleList([ns.Embedding(9, 4), ns.LSTM(4, 4), ns.Linear(4, 9)])
        steps = optimizer(model.parameters(), 0.05)
        losses = []
        for _ in range(5):
            tokens = torch.arange(8) % 5
            loss = ns.CrossEntropyLoss()(model[2](model[1](model[0](tokens))[0]), tokens)
            steps.zero_grad()
            loss.backward()
            clip(model.parameters(), 0.5)
            steps.step()
            losses.append(float(loss.detach()))
        return losses

    expected = train(torch.nn, torch.optim.Adam, torch.nn.utils.clip_grad_norm_)
    with _patched():
        assert torch.nn.LSTM is nn.LSTM
        assert torch.optim.Adam is optim.Adam
        got = train(torch.nn, torch.optim.Adam, torch.nn.utils.clip_grad_norm_)
        with llmkern.backend("torch"):
            forced = train(torch.nn, torch.optim.Adam, torch.nn.utils.clip_grad_norm_)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))
    torch.testing.assert_close(torch.tensor(forced), torch.tensor(expected))


def test_errors_stay_torchs_when_names_are_patched() -> None:
    for arguments in ((LOGITS, LABELS[:2]), (LOGITS, LABELS, torch.rand(3))):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            torch.nn.functional.cross_entropy(*arguments)
        with _patched(), pytest.raises(type(expected.value)) as got:
            torch.nn.functional.cross_entropy(*arguments)
        assert str(got.value) == str(expected.value)


def test_a_mode_over_patched_names_ends() -> None:
    expected = F.cross_entropy(LOGITS, LABELS)
    with _patched(), Log() as log:
        got = torch.nn.functional.cross_entropy(LOGITS, LABELS)
    torch.testing.assert_close(got, expected)
    assert len(log.functions) == 1
