"""What torch's recurrent layers do not have: every option against its reference, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import INTERPRETING, assert_accurate, kernels
from recurrent import build, inputs, run, tensors
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llmkern
import llmkern.nn as nn

KERNELS = kernels("lstm")
CLASSES = ["LSTM", "GRU", "RNN"]


OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "none": ({}, ("sLSTM",)),
    "clip": ({"clip": 0.3}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "zoneout": ({"zoneout": 0.25}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "zoneout of both": ({"zoneout": (0.25, 0.5)}, ("LSTM",)),
    "heads": ({"num_heads": 3}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "weight dropout": ({"weight_dropout": 0.5}, ("LSTM", "GRU", "RNN")),
    "peephole": ({"peephole": True}, ("LSTM",)),
    "forget bias": ({"forget_bias": 1.0}, ("LSTM",)),
    "forget bias alone": ({"forget_bias": 1.0, "bias": False}, ("LSTM",)),
    "cell states": ({"return_cell_states": True}, ("LSTM", "sLSTM")),
    "chunks": ({"checkpoint_chunks": 3}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "norms": ({"layer_norm": True}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "norms without biases": ({"layer_norm": True, "bias": False}, ("LSTM", "GRU")),
    "norms and clip": ({"layer_norm": True, "clip": 0.3}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "norms and heads": ({"layer_norm": True, "num_heads": 3, "zoneout": 0.25}, ("LSTM", "GRU", "RNN", "sLSTM")),
    "norms and chunks": ({"layer_norm": True, "checkpoint_chunks": 3}, ("LSTM", "GRU")),
    "norms and a projection": ({"layer_norm": True, "proj_size": 7}, ("LSTM",)),
    "norms and all": (
        {"clip": 0.4, "zoneout": (0.1, 0.2), "num_heads": 2, "peephole": True, "return_cell_states": True}
        | {"layer_norm": True, "forget_bias": 1.0},
        ("LSTM",),
    ),
    "all": (
        {"clip": 0.4, "zoneout": (0.1, 0.2), "num_heads": 2, "peephole": True, "return_cell_states": True},
        ("LSTM",),
    ),
}
# Triton's kernels have no norms.
CASES = [
    (name, option)
    for option, (_, names) in OPTIONS.items()
    for name in names
    if not INTERPRETING or "norms" not in option
]


# 15 sequences: more than one block of rows, and no multiple of one.
@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "option"), CASES)
@pytest.mark.parametrize("shape", ["steps", "batch_first", "packed"])
@pytest.mark.parametrize("train", [True] if INTERPRETING else [True, False])
def test_options(kernel: str, name: str, option: str, shape: str, train: bool) -> None:
    module = build(name, 5, 18, batch_first=shape == "batch_first", **OPTIONS[option][0]).train(train)
    x, states = inputs(name, 15, shape, torch.float32)
    if module.proj_size:
        states = (states[0][..., : module.proj_size].contiguous(), states[1])
    got, own = run(module, x, states, kernel), run(module, x, states, "reference")
    wide = tuple(s.double() for s in states) if isinstance(states, tuple) else states.double()
    right = run(module.double(), x.double(), wide, "reference")
    # A norm divides by a deviation at every step, and multiplies what was rounded before: the largest of so few errors
    # varies by more than a factor of 2. On average they are the reference's.
    ulps = 32 if module.layer_norm else 4
    for a, b, c in zip(got, right, own, strict=True):
        assert_accurate(a, b, c, ulps)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("norms", [False] if INTERPRETING else [False, True])
def test_layers_and_directions(kernel: str, name: str, norms: bool) -> None:
    layers = 1 if INTERPRETING else 2
    options = {"num_layers": layers, "bidirectional": True, "zoneout": 0.3, "num_heads": 2, "checkpoint_chunks": 2}
    module = build(name, 5, 18, layer_norm=norms, **options).double()
    for shape in ("packed",) if INTERPRETING else ("steps", "packed"):
        x, states = inputs(name, 9, shape, torch.float64, layers=2 * layers)
        for a, b in zip(run(module, x, states, kernel), run(module, x, states, "reference"), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("option", ["peephole", "cell states", "norms", "all", "norms and all"])
@pytest.mark.parametrize("where", [*KERNELS, "reference"])
def test_second_derivatives(option: str, where: str) -> None:
    options = {**OPTIONS[option][0], "num_heads": 1}
    # No kinks, and no mask: finite differences see neither.
    options.pop("clip", None)
    module = build("LSTM", 2, 4, **options).double().eval()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    states = tuple(torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = dict(module.named_parameters())

    def function(x: Tensor, h: Tensor, c: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(weights, values, strict=True))
        with llmkern.backend(where):
            return tuple(tensors(torch.func.functional_call(module, parameters, (x, (h, c)))))

    arguments = (x, *states, *(p.detach().requires_grad_() for p in weights.values()))
    assert torch.autograd.gradcheck(function, arguments)
    # Along random directions: element by element it takes ten times as long.
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.kernels
@pytest.mark.parametrize("where", [*KERNELS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_slstm_is_the_papers_formula(where: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    H, lstm = 17, nn.sLSTM(5, 17).to(dtype)
    x = torch.randn(9, 4, 5).to(dtype)
    with llmkern.backend(where):
        y, (h, c) = lstm(x)
    w_ih, w_hh, b_ih, b_hh = (p.detach().double() for p in lstm.parameters())
    # Unstabilised, in fp64.
    h_, c_, n_ = (torch.zeros(4, H, dtype=torch.float64) for _ in range(3))
    for step in x.double():
        i, f, z, o = (step @ w_ih.T + b_ih + h_ @ w_hh.T + b_hh).chunk(4, -1)
        c_ = f.sigmoid() * c_ + i.exp() * z.tanh()
        n_ = f.sigmoid() * n_ + i.exp()
        h_ = o.sigmoid() * c_ / n_
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(h[0].double(), h_, atol=tolerance, rtol=tolerance)
    c, n, m = c[0].double().chunk(3, -1)
    torch.testing.assert_close(c * m.exp(), c_, atol=tolerance * 4, rtol=tolerance * 4)
    torch.testing.assert_close(n * m.exp(), n_, atol=tolerance * 4, rtol=tolerance * 4)
    assert torch.equal(y[-1], h[0])
    # Gates whose exponentials overflow, in both directions.
    with torch.no_grad(), llmkern.backend(where):
        lstm.bias_ih_l0[:H] = torch.linspace(-200, 200, H).to(dtype)
        assert torch.isfinite(lstm(x)[0]).all()


def test_slstm_differentiates_twice_and_says_what_does_not_fit() -> None:
    lstm = nn.sLSTM(2, 4, num_heads=2).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    c = (torch.rand(1, 2, 12, dtype=torch.float64) + 0.5).requires_grad_()

    def function(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(lstm(x, (h, c))))

    assert torch.autograd.gradcheck(function, (x, h, c))
    assert torch.autograd.gradgradcheck(function, (x, h, c))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 12\), got \[1, 2, 4\]"):
        lstm(x, (h, h))
    with pytest.raises(ValueError, match="only supported for LSTM"):
        nn.sLSTM(2, 4, proj_size=2)
    with pytest.raises(ValueError, match="slstm: shapes do not fit"):
        llmkern.functional.slstm(x, (h, h), list(lstm.parameters()), True, 1, 0.0, False, False, False)


def test_cell_states_are_those_of_every_step() -> None:
    lstm = nn.LSTM(5, 7, return_cell_states=True)
    x = torch.randn(4, 3, 5)
    _, (_, c), cells = lstm(x)
    assert cells.shape == (4, 3, 7)
    torch.testing.assert_close(cells[-1], c[0])
    state = None
    for t in range(4):
        _, state, each = lstm(x[t : t + 1], state)
        torch.testing.assert_close(each[0], cells[t])
    packed = lstm(pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False))
    torch.testing.assert_close(torch.nn.utils.rnn.unpack_sequence(packed[2])[1], cells[:, 1])
    assert lstm(x[:, 0])[2].shape == (4, 7)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
def test_states_in_fp32_beside_bf16(kernel: str, name: str) -> None:
    torch.manual_seed(0)
    module = getattr(nn, name)(5, 18, state_dtype=torch.float32).bfloat16()
    plain = getattr(nn, name)(5, 18).bfloat16()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5 if INTERPRETING else 40, 3, 5).bfloat16()
    with llmkern.backend(kernel):
        whole = tensors(module(x)[1])
    assert all(state.dtype == torch.float32 for state in whole)
    errors = []
    for one in (module, plain):
        state = None
        for part in x.split(1):
            with llmkern.backend(kernel):
                y, state = one(part, state)
            assert y.dtype == torch.bfloat16
        errors.append(max((a.float() - b).abs().max() for a, b in zip(tensors(state), whole, strict=True)))
    # Cut anywhere, the sequence is the same but for h, which products see in bf16 either way.
    assert errors[0] <= errors[1]
    for a, b in zip(run(module, x, module(x)[1], kernel), run(module, x, module(x)[1], "reference"), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), atol=0.1, rtol=0.1)


def test_zoneout_keeps_its_share() -> None:
    for share in (0.0, 0.3, 1.0):
        rnn = nn.RNN(1, 2000, zoneout=share)
        hx = torch.randn(1, 20, 2000)
        y, _ = rnn(torch.randn(1, 20, 1), hx)
        assert abs((y == hx).double().mean() - share) < 0.01


def test_variational_dropout_draws_one_mask_for_all_steps() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 7, 2, dropout=0.5, variational_dropout=True, bidirectional=True)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if "l1" in name:
                parameter.fill_(0.0)
        # The second layer's cell shows in its gate g what it is given.
        lstm.weight_ih_l1.view(4, 7, 14)[2] = torch.eye(14)[:7]
        lstm.bias_ih_l1.view(4, 7)[:2] = torch.tensor([[9.0], [-20.0]])
        lstm.bias_ih_l1.view(4, 7)[3] = 20.0
    x = torch.randn(6, 3, 5)
    for given in (x, pack_padded_sequence(x, torch.tensor([6, 4, 2]))):
        out = lstm(given)[0]
        y = torch.nn.utils.rnn.pad_packed_sequence(out)[0] if isinstance(out, PackedSequence) else out
        dropped = y[..., :7] == 0
        first = dropped[0]
        assert 0.2 < first.double().mean() < 0.8
        assert torch.equal(dropped[:2], first.expand(2, -1, -1))
    lstm.eval()
    assert not (lstm(x)[0][..., :7] == 0).any()


def test_weight_dropout_is_one_mask_a_call() -> None:
    rnn = nn.RNN(3, 40, weight_dropout=0.5)
    x, hx = torch.zeros(2, 1, 3), torch.ones(1, 1, 40)
    assert not torch.equal(rnn(x, hx)[0], rnn(x, hx)[0])
    rnn.eval()
    assert torch.equal(rnn(x, hx)[0], rnn(x, hx)[0])
    rnn.train()
    y = rnn(x, hx)[0]
    grad = torch.autograd.grad(y.sum(), rnn.weight_hh_l0)[0]
    assert 0.4 < (grad == 0).double().mean() < 0.6


@pytest.mark.skipif(llmkern.dispatch.unavailable("native") is not None, reason="no native build")
def test_chunks_save_memory() -> None:
    kept = []
    for chunks in (1, 8):
        lstm = nn.LSTM(16, 32, checkpoint_chunks=chunks)
        saved: dict[int, int] = {}
        x = torch.randn(256, 4, 16, requires_grad=True)

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lstm(x)
        kept.append(sum(saved.values()))
    assert kept[1] < kept[0] / 2


WRONG: dict[str, tuple[Any, ...]] = {
    "zoneout": ([0.1, 0.1], 1.5, True, float("nan"), "a", None, (0.1,), (0.1, 2.0), (0.1, True)),
    "weight_dropout": ("a", -0.1, 2, None, True, float("nan")),
    "clip": (None, -1.0, float("nan"), "a", True),
    "forget_bias": (None, "a", float("nan"), True),
    "num_heads": (2.0, 0, True, "2", None, 4),
    "checkpoint_chunks": (1.5, 0, True, None),
    "state_dtype": (torch.int32, "float32", torch.complex64),
    "variational_dropout": (1, "yes", None),
    "return_cell_states": (1, None),
    "peephole": (1, None),
    "layer_norm": (1, "a"),
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
def test_an_option_is_checked_whenever_it_is_set(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option}: got .*expected "):
        nn.LSTM(5, 18, **{option: value})
    module = nn.LSTM(5, 18)
    with pytest.raises(ValueError, match=f"^{option}: got .*expected "):
        setattr(module, option, value)
    assert getattr(module, option) == getattr(nn.LSTM(5, 18), option)


def test_options_that_a_class_or_its_weights_do_not_fit() -> None:
    with pytest.raises(TypeError):
        nn.GRU(5, 18, peephole=True)
    for name in ("GRU", "RNN", "sLSTM"):
        with pytest.raises(ValueError, match="has one state; expected a number"):
            getattr(nn, name)(5, 18, zoneout=(0.1, 0.1))
    gru = nn.GRU(5, 18, num_heads=3)
    with pytest.raises(ValueError, match="num_heads: got 2, expected 3"):
        gru.num_heads = 2
    gru.zoneout, gru.checkpoint_chunks = 0.25, 2
    assert repr(gru) == "GRU(5, 18, num_heads=3, zoneout=0.25, checkpoint_chunks=2)"
    with pytest.raises(ValueError, match="clip: got None"):
        llmkern.functional.gru(
            torch.randn(2, 1, 5), torch.randn(1, 1, 18), [], True, 1, 0.0, True, False, False, clip=None
        )


EXTRAS = ("clip", "zoneout", "heads", "weight dropout", "chunks", "norms", "none")


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "sLSTM"])
def test_empty_batches(name: str) -> None:
    for option in EXTRAS:
        module = getattr(nn, name)(5, 18, 2, bidirectional=True, dropout=0.5, **OPTIONS[option][0])
        x = torch.randn(4, 0, 5, requires_grad=True)
        y, state = module(x)
        assert y.shape == (4, 0, 36)
        assert tensors(state)[0].shape == (4, 0, 18)
        for grad, p in zip(
            torch.autograd.grad(y.sum(), [x, *module.parameters()]), [x, *module.parameters()], strict=True
        ):
            assert torch.equal(grad, torch.zeros_like(p))
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            module(torch.randn(0, 2, 5))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "sLSTM"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_states_under_autocast(name: str, dtype: torch.dtype) -> None:
    module = build(name, 5, 18, state_dtype=torch.float32)
    x, state = inputs(name, 3, "steps", torch.float32)
    with torch.autocast("cpu", dtype):
        y, final = module(x, state)
        narrow, _ = module(x.to(dtype), state)
    right, right_final = module(x, state)
    assert y.dtype == narrow.dtype == dtype
    assert all(t.dtype == torch.float32 for t in tensors(final))
    for a, b in zip([y, narrow, *tensors(final)], [right, right, *tensors(right_final)], strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.1, rtol=0.1)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_options_show() -> None:
    lstm = nn.LSTM(5, 18, zoneout=0.1, num_heads=2, peephole=True)
    assert repr(lstm) == "LSTM(5, 18, peephole=True, num_heads=2, zoneout=0.1)"
    assert repr(nn.LSTM(5, 18)) == repr(torch.nn.LSTM(5, 18))
    assert lstm.weight_hh_l0.shape == (72, 9)
    assert lstm.weight_peephole_l0.shape == (3, 18)
    other = nn.LSTM(5, 18, zoneout=0.1, num_heads=2, peephole=True)
    other.load_state_dict(lstm.state_dict())
    x = torch.randn(3, 2, 5)
    assert torch.equal(lstm.eval()(x)[0], other.eval()(x)[0])
