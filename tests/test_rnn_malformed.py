"""Calls that torch refuses, or takes though they look malformed: torch's answer, error texts included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import llmkern.nn as nn

I, H = 3, 4
FORMS: list[dict[str, Any]] = [{}, {"batch_first": True, "num_layers": 2, "bidirectional": True}]


def _packed(sizes: Any, rows: int, *indices: Any, width: int = I, dtype: torch.dtype = torch.float32) -> PackedSequence:
    data = torch.linspace(-1, 1, rows * width, dtype=dtype).reshape(rows, width)
    return PackedSequence(data, sizes if isinstance(sizes, Tensor) else torch.tensor(sizes), *indices)


def _inputs() -> dict[str, Any]:
    x = torch.randn(5, 2, I)
    back = torch.tensor([1, 2, 0])
    return {
        "a string": "x",
        "None": None,
        "a list": [1, 2],
        "an array": x.numpy(),
        "no dimension": torch.tensor(1.0),
        "one dimension": torch.randn(I),
        "four dimensions": torch.randn(1, 2, I, I),
        "another width": torch.randn(5, 2, I + 1),
        "float64": x.double(),
        "int64": x.long(),
        "bool": x > 0,
        "complex": x.to(torch.complex64),
        "float16": x.half(),
        "no steps": torch.randn(0, 2, I),
        "no sequences": torch.randn(5, 0, I),
        "NaN": x * float("nan"),
        "a pair": (torch.randn(6, I), torch.tensor([3, 2, 1])),
        "packed": _packed([3, 2, 1], 6),
        "sizes that grow": _packed([1, 2, 3], 6),
        "sizes that end in 0": _packed([2, 1, 0], 3),
        "sizes of 0": _packed([0, 0], 0),
        "a negative size": _packed([3, -1, 1], 3),
        "no sizes": _packed(torch.empty(0, dtype=torch.int64), 0),
        "rows missing": _packed([3, 2, 1], 5),
        "rows left over": _packed([3, 2, 1], 9),
        "int32 sizes": _packed(torch.tensor([3, 2, 1], dtype=torch.int32), 6),
        "float sizes": _packed([3.0, 2.0, 1.0], 6),
        "sizes in a matrix": _packed([[3, 2, 1]], 6),
        "sizes with a stride": _packed(torch.tensor([3, 9, 2, 9, 1])[::2], 6),
        "packed, another width": _packed([3, 2, 1], 6, width=I + 1),
        "packed float64": _packed([3, 2, 1], 6, dtype=torch.float64),
        "packed in three dimensions": PackedSequence(torch.randn(6, 1, I), torch.tensor([3, 2, 1])),
        "packed, permuted": _packed([3, 2, 1], 6, torch.tensor([2, 0, 1]), back),
        "packed, an index outside": _packed([3, 2, 1], 6, torch.tensor([5, 0, 1]), back),
        "packed, too few indices": _packed([3, 2, 1], 6, torch.tensor([0, 1]), torch.tensor([0, 1])),
    }


def _one(layers: int, batch: int) -> dict[str, Any]:
    def state(*shape: int) -> Tensor:
        return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)

    h = state(layers, batch, H)
    return {
        "well": h,
        "(B, H)": state(batch, H),
        "(L, H)": state(layers, H),
        "(H)": state(H),
        "four dimensions": h.unsqueeze(0),
        "another batch": state(layers, batch + 1, H),
        "another width": state(layers, batch, H + 1),
        "another depth": state(layers + 1, batch, H),
        "float64": h.double(),
        "int64": h.long(),
        "float16": h.half(),
        "empty": torch.empty(0),
    }


def _states(layers: int, batch: int, pair: bool) -> dict[str, Any]:
    one = _one(layers, batch)
    h, both = one["well"], torch.randn(2, layers, batch, H)
    if not pair:
        return {"None": None, "a string": "h", "a number": 1.0, "a list": [h], "a pair": (h, h), "()": (), **one}
    whole = {"None": None, "one": h, "stacked": both, "pairs of sequences": torch.randn(2, batch, H), "a string": "hc"}
    tuples = {
        "()": (),
        "(h)": (h,),
        "(h, c, c)": (h, h, h),
        "[h, c]": [h, h],
        "(h, None)": (h, None),
        "(None, c)": (None, h),
    }
    each = {f"h: {key}": (value, h) for key, value in one.items()} | {
        f"c: {key}": (h, value) for key, value in one.items()
    }
    return {**whole, "a number": 1.0, **tuples, **each, **{f"both: {key}": (v, v.clone()) for key, v in one.items()}}


def _flat(out: Any) -> list[Tensor]:
    if isinstance(out, PackedSequence):
        return [out.data]
    return [out] if isinstance(out, Tensor) else [t for part in out for t in _flat(part)]


def answer(module: Any, input: Any, states: Any) -> Any:
    try:
        return _flat(module(input, states))
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("form", FORMS, ids=["plain", "deep"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_torchs_answer_to_every_malformed_call(name: str, form: dict[str, Any]) -> None:
    ours, theirs = getattr(nn, name)(I, H, **form), getattr(torch.nn, name)(I, H, **form)
    theirs.load_state_dict(ours.state_dict())
    layers, pair, inputs = 4 if form else 1, name == "LSTM", _inputs()
    x = torch.randn(5, 2, I).transpose(0, int(bool(form)))
    calls = [(key, input, "None", None) for key, input in inputs.items()]
    given = {"plain": (2, x), "a step": (2, x[:, :1] if form else x[:1]), "no batch": (2, x[0]), "1-D": (2, x[0, 0])}
    packs = ("packed", "packed, permuted", "packed, an index outside", "packed, too few indices", "rows left over")
    given |= {key: (3, inputs[key]) for key in packs}
    for key, (batch, input) in given.items():
        calls += [(key, input, what, hx) for what, hx in _states(layers, batch, pair).items()]
    for key, input, what, hx in calls:
        if pair and isinstance(input, PackedSequence) and what.endswith(("another depth", "four dimensions")):
            # torch reads outside of memory, so ours says what it says of plain inputs.
            assert answer(ours, input, hx)[0] is RuntimeError
            continue
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got, want = answer(ours, input, hx), answer(theirs, input, hx)
            if isinstance(want, tuple):
                assert got == want, (key, what)
            else:
                torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m: f"{key}, {what}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_torchs_answer_to_every_malformed_call_of_a_cell(name: str) -> None:
    ours, theirs = getattr(nn, name)(I, H), getattr(torch.nn, name)(I, H)
    theirs.load_state_dict(ours.state_dict())
    pair, h = name == "LSTMCell", torch.randn(2, H)
    ones = [
        h,
        h[0],
        h[:1],
        torch.randn(3, H),
        torch.randn(2, H + 1),
        h.double(),
        h.long(),
        torch.empty(0),
        h[None],
        h[0, 0],
    ]
    states = [None, "h", 1.0, (), [h], (h,), (h, h), [h, h], (h, h, h), (h, None), (None, h), *ones]
    if pair:
        states += [(one, h) for one in ones] + [(h, one) for one in ones] + [(one, one) for one in ones]
    x = torch.randn(2, I)
    inputs = [x, x[0], x[None], x[0, 0], x.double(), x.long(), x[:0], torch.randn(2, I + 1), "x", None, [1.0]]
    for input in inputs:
        for hx in states:
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    got, want = answer(ours, input, hx), answer(theirs, input, hx)
                if isinstance(want, tuple):
                    assert got == want, (input, hx)
                else:
                    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_torchs_answer_where_a_weight_was_taken_away(name: str) -> None:
    x = torch.randn(3, 2, I)
    for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        modules = [getattr(package, name)(I, H) for package in (nn, torch.nn)]
        modules[1].load_state_dict(modules[0].state_dict())
        for module in modules:
            setattr(module, what if "Cell" in name else f"{what}_l0", None)
        states = torch.randn(*(() if "Cell" in name else (1,)), 2, H)
        hx = (states, states) if "LSTM" in name else states
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for given in (None, hx):
                    got, want = (answer(m, x[0] if "Cell" in name else x[:1], given) for m in modules)
                    if isinstance(want, tuple):
                        assert got == want, what
                    else:
                        torch.testing.assert_close(got, want)


def test_an_slstm_says_what_it_expects() -> None:
    layer, x = nn.sLSTM(I, H), torch.randn(5, 2, I)
    with pytest.raises(ValueError, match="2D or 3D"):
        layer(x[0, 0])
    for input, hx in ((x, x), (x, (x, None)), (_packed([3, 2, 1], 7), None)):
        with pytest.raises((ValueError, RuntimeError, TypeError, AttributeError)):
            layer(input, hx)
