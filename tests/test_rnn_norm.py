"""Layer-normalised recurrent cells: the formula, every dtype, every number of threads. Beside other options they are in
``test_rnn_options.py``."""

from __future__ import annotations

import pytest
import torch
from checks import assert_accurate
from recurrent import build, inputs, run

import llmkern
import llmkern.nn as nn

NATIVE = llmkern.dispatch.unavailable("native") is None


def test_layer_norm_is_that_of_a_loop_over_steps() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(5, 7, layer_norm=True), torch.randn(6, 3, 5)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    h = c = torch.zeros(3, 7)
    norm = torch.nn.functional.layer_norm
    for step in x:
        a = norm(step @ lstm.weight_ih_l0.T, (28,), lstm.weight_norm_ih_l0) + lstm.bias_ih_l0
        a = a + norm(h @ lstm.weight_hh_l0.T, (28,), lstm.weight_norm_hh_l0) + lstm.bias_hh_l0
        i, f, g, o = a.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c, (7,), lstm.weight_norm_c_l0, lstm.bias_norm_c_l0).tanh()
    y, (h_n, c_n) = lstm(x)
    for got, want in ((y[-1], h), (h_n[0], h), (c_n[0], c)):
        torch.testing.assert_close(got, want)
    assert not NATIVE or llmkern.explain(lstm, x).backends == ("native",)
    for name in ("GRU", "RNN", "sLSTM"):
        other = getattr(nn, name)(5, 7, 2, bidirectional=True, layer_norm=True)
        # The identity at first, of both products: their scale does not matter.
        scaled = getattr(nn, name)(5, 7, 2, bidirectional=True, layer_norm=True)
        scaled.load_state_dict(
            {k: v * 3 if k.startswith(("weight_ih", "weight_hh")) else v for k, v in other.state_dict().items()}
        )
        torch.testing.assert_close(other(x)[0], scaled(x)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not NATIVE, reason="no native build")
def test_norms_compile_in_one_graph() -> None:
    module = build("LSTM", 5, 18, layer_norm=True)
    x, states = inputs("LSTM", 15, "steps", torch.float32)
    compiled = torch.compile(lambda x, states: module(x, states), backend="aot_eager", fullgraph=True)
    compiled.parameters = module.parameters  # type: ignore[attr-defined]
    for a, b in zip(run(compiled, x, states, "native"), run(module, x, states, "native"), strict=True):
        torch.testing.assert_close(a, b)


# One unit, whose norms are of one number or of its gates; a tail of more vectors than one; more rows than a block of
# them has, with fewer tokens than are worth packing weights, and more.
@pytest.mark.skipif(not NATIVE, reason="no native build")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "sLSTM"])
@pytest.mark.parametrize(("T", "B", "H"), [(2, 3, 1), (3, 5, 35), (1, 70, 17), (2, 140, 17), (9, 2, 130)])
def test_norms_in_every_dtype(name: str, dtype: torch.dtype, T: int, B: int, H: int) -> None:
    module = build(name, 19, H, bidirectional=True, layer_norm=True).to(dtype)
    _, states = inputs(name, B, "steps", torch.float32, H, 2)
    states = tuple(s.to(dtype) for s in states) if isinstance(states, tuple) else states.to(dtype)
    x = torch.randn(T, B, 19, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = run(module, x, states, "native")
    wide = tuple(s.double() for s in states) if isinstance(states, tuple) else states.double()
    right = run(module.double(), x.double(), wide, "reference")
    # The reference rounds results alone; kernels round h and gates that they keep, too, and their gradients. What is
    # left of one number without its mean is a rounding, divided by a deviation of nothing.
    narrow = dtype in (torch.bfloat16, torch.float16)
    for a, b in zip(got, right, strict=True):
        assert a.dtype == dtype
        assert_accurate(a, b, ulps=32 if narrow else 256, scale=100 if H == 1 else 1)


@pytest.mark.skipif(not NATIVE, reason="no native build")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "sLSTM"])
@pytest.mark.parametrize(("T", "B", "H"), [(40, 9, 33), (4, 2, 200), (1, 3, 200)])
def test_norms_give_the_same_bits_for_any_number_of_threads(
    name: str, dtype: torch.dtype, T: int, B: int, H: int
) -> None:
    module = build(name, 19, H, layer_norm=True).to(dtype)
    x, (_, states) = torch.randn(T, B, 19).to(dtype), inputs(name, B, "steps", dtype, H)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(module, x, states, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
