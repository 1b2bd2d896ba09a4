"""Recurrent layers under autocast, every combination of dtypes: torch's dtypes, values and errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from recurrent import tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern.nn as nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, projected": ("LSTM", {"proj_size": 3}),
    "LSTM, both directions": ("LSTM", {"bidirectional": True, "num_layers": 2}),
    "GRU": ("GRU", {}),
    "GRU, both directions": ("GRU", {"bidirectional": True, "num_layers": 2}),
    "RNN": ("RNN", {}),
    "RNN, relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {}),
}
# Without oneDNN torch takes the steps of an LSTM one by one, as it does with a dtype that oneDNN lacks on a machine.
CALLS = [
    (case, form, onednn)
    for case, (name, _) in CASES.items()
    for form in (("one step",) if name.endswith("Cell") else ("steps first", "batch first", "packed"))
    for onednn in ((True, False) if name == "LSTM" else (True,))
]


def _layers(options: dict[str, Any]) -> int:
    return options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)


def _result(module: Any, x: Any, states: Any, cast: torch.dtype) -> list[Tensor] | str:
    try:
        with torch.autocast("cpu", dtype=cast):
            return tensors(module(x, states))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize(("case", "form", "onednn"), CALLS)
def test_every_combination_of_dtypes_gives_what_torch_gives(case: str, form: str, onednn: bool) -> None:
    (name, options), cell = CASES[case], form == "one step"
    torch.manual_seed(0)
    ours, theirs = (getattr(where, name)(5, 7, **options) for where in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    ours.batch_first = theirs.batch_first = form == "batch first"
    dense, shape = torch.randn(4, 4, 5)[: 1 if cell else 4].squeeze(0), () if cell else (_layers(options),)
    widths = (options.get("proj_size", 7), 7)[: 2 if "LSTM" in name else 1]
    states = [torch.randn(*shape, 4, width) for width in widths]
    for of_x, of_h, of_c, cast in itertools.product(DTYPES, (None, *DTYPES), DTYPES, (torch.bfloat16, torch.float16)):
        if len(states) == 1 and of_c != torch.float32:
            continue
        x: Any = dense.to(of_x)
        x = pack_padded_sequence(x, torch.tensor([4, 2, 2, 1])) if form == "packed" else x
        given = tuple(s.to(dtype) for s, dtype in zip(states, (of_h, of_c), strict=False)) if of_h else None
        given = given[0] if given and len(given) == 1 else given
        with torch.backends.mkldnn.flags(enabled=onednn):
            got, want = (_result(module, x, given, cast) for module in (ours, theirs))
        at = (of_x, of_h, of_c, cast)
        if isinstance(want, str) and "could not create" in want and not isinstance(got, str):
            # oneDNN has no bf16 LSTM on a CPU without AVX-512; ours gives what it would give.
            assert [t.dtype for t in got] == [cast] * len(got), at
            continue
        if isinstance(got, str) or isinstance(want, str):
            assert got == want, at
            continue
        assert [t.dtype for t in got] == [t.dtype for t in want], at
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), atol=0.03, rtol=0.03)
