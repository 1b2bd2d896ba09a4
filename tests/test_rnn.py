"""Recurrent layers: values, gradients, options and errors against torch's, kernels against the fp64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llmkern
import llmkern.nn as nn
from llmkern import ops, reference
from llmkern.dispatch import BackendError
from llmkern.ops.rnn import rnn

CLASSES = ["LSTM", "GRU", "RNN"]
NATIVE = llmkern.dispatch.unavailable("native") is None


def _pair(name: str, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Any, Any]:
    """Our module and torch's, with the same parameters."""
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(*args, **kwargs).to(dtype)
    ours = getattr(nn, name)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _flat(outputs: Any) -> list[Tensor]:
    """y and the final states, as a flat list."""
    y, states = outputs
    y = y.data if isinstance(y, PackedSequence) else y
    return [y, *(states if isinstance(states, tuple) else (states,))]


def _results(module: Any, x: Any, states: Any) -> list[Tensor]:
    """Outputs, and gradients of inputs, states and parameters for random cotangents on every output."""
    data = x.data if isinstance(x, PackedSequence) else x
    data = data.detach().clone().requires_grad_()
    x = x._replace(data=data) if isinstance(x, PackedSequence) else data
    leaves = [data]
    if states is not None:
        given = [s.detach().clone().requires_grad_() for s in (states if isinstance(states, tuple) else (states,))]
        leaves += given
        states = tuple(given) if isinstance(states, tuple) else given[0]
    outputs = _flat(module(x, states))
    g = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(out.shape, generator=g).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, [*leaves, *module.parameters()], cotangents)
    return [out.detach() for out in outputs] + list(grads)


def _states(name: str, layers: int, B: int, H: int, P: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    h = torch.randn(layers, B, P or H).to(dtype)
    return (h, torch.randn(layers, B, H).to(dtype)) if name == "LSTM" else h


def _compare(ours: Any, theirs: Any, x: Any, states: Any) -> None:
    got, own = _results(ours, x, states), _results(theirs, x, states)
    wide = (
        states
        if states is None
        else tuple(s.double() for s in states)
        if isinstance(states, tuple)
        else states.double()
    )
    right = _results(theirs.double(), x.double(), wide)
    # Weights' gradients are sums over all tokens, of terms of order 1; in fp64 the reference rounds as much as we do.
    ulps = 16 if got[0].dtype == torch.float64 else 8
    for a, b, c in zip(got, right, own, strict=True):
        assert_accurate(a, b, c, ulps, scale=0.1)


# Units: less than a vector, a vector and one more, several and a tail; batch rows: less and more than one block of 6.
# Up to 16 tokens read weights where they lie, more pack them; 130 units share them among threads, or programs.
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "B", "I", "H"),
    [(1, 1, 1, 1), (3, 3, 5, 17), (2, 17, 130, 3), (2 if INTERPRETING else 4, 7, 3, 130), (1, 33, 17, 18)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_kernel(
    backend: str, device: torch.device, name: str, dtype: torch.dtype, T: int, B: int, I: int, H: int, bias: bool
) -> None:
    if INTERPRETING and H == 130 and not bias:
        pytest.skip("slow, and without biases smaller sizes are")
    ours, theirs = (module.to(device) for module in _pair(name, I, H, bias=bias, dtype=dtype))
    states = _states(name, 1, B, H, dtype=dtype)
    states = tuple(s.to(device) for s in states) if isinstance(states, tuple) else states.to(device)
    _compare(ours, theirs, torch.randn(T, B, I).to(device, dtype), states)


OPTIONS = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 2, "bias": False},
    {"batch_first": True},
    {"batch_first": True, "bidirectional": True},
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("where", ["auto", "reference"])
def test_options(name: str, options: dict[str, Any], with_states: bool, where: str) -> None:
    ours, theirs = _pair(name, 5, 7, **options)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(3, 4, 5) if options.get("batch_first") else torch.randn(4, 3, 5)
    with llmkern.backend(where):
        _compare(ours, theirs, x, _states(name, layers, 3, 7) if with_states else None)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("where", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
def test_unbatched(name: str, where: str, options: dict[str, Any]) -> None:
    ours, theirs = _pair(name, 5, 7, **options)
    states = _states(name, 2 if options.get("bidirectional") else 1, 1, 7)
    states = tuple(s[:, 0] for s in states) if isinstance(states, tuple) else states[:, 0]
    with llmkern.backend(where):
        _compare(ours, theirs, torch.randn(4, 5), states)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("where", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_projection(where: str, options: dict[str, Any]) -> None:
    ours, theirs = _pair("LSTM", 5, 7, proj_size=3, **options)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    with llmkern.backend(where):
        _compare(ours, theirs, torch.randn(4, 3, 5), _states("LSTM", layers, 3, 7, 3))


# Repeated lengths, a length of 1, an unsorted batch.
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [2, 5, 1, 5]])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("where", ["auto", "reference"])
def test_packed(name: str, lengths: list[int], options: dict[str, Any], with_states: bool, where: str) -> None:
    ours, theirs = _pair(name, 5, 7, **options)
    layers = 4 if options else 1
    packed = pack_padded_sequence(torch.randn(5, 4, 5), torch.tensor(lengths), enforce_sorted=lengths[0] == 5)
    with llmkern.backend(where):
        _compare(ours, theirs, packed, _states(name, layers, 4, 7) if with_states else None)


# Enough tokens for the packed panels, in every direction, layout and mode; a projection wider than one panel.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 70, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("shape", ["steps", "batch_first", "packed"])
@pytest.mark.parametrize("name", CLASSES)
def test_larger_sizes(name: str, shape: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    if "proj_size" in options and name != "LSTM":
        pytest.skip("torch projects LSTM only")
    B, H, P = 19, 90, options.get("proj_size", 0)
    ours, theirs = _pair(name, 5, H, batch_first=shape == "batch_first", dtype=dtype, **options)
    x: Any = torch.randn(B, 7, 5) if shape == "batch_first" else torch.randn(7, B, 5)
    x = x.to(dtype)
    if shape == "packed":
        x = pack_padded_sequence(x, torch.tensor([7, 7, 6, *[5] * 8, 4, 3, 3, 2, *[1] * 4]))
    _compare(ours, theirs, x, _states(name, 1 + options.get("bidirectional", False), B, H, P, dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_dropout_between_layers(name: str) -> None:
    x = torch.randn(4, 3, 5)
    for p, train in ((1.0, True), (0.5, False)):
        ours, theirs = (m.train(train) for m in _pair(name, 5, 7, num_layers=2, dropout=p))
        for got, want in zip(_flat(ours(x)), _flat(theirs(x)), strict=True):
            torch.testing.assert_close(got, want)
    ours, _ = _pair(name, 5, 7, num_layers=2, dropout=0.5)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        getattr(nn, name)(5, 7, dropout=0.5)


def test_relu_layers() -> None:
    _compare(*_pair("RNN", 5, 7, 2, "relu"), torch.randn(4, 3, 5), torch.randn(2, 3, 7))


@pytest.mark.parametrize(("mode", "G"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_differentiates(mode: str, G: int, reverse: bool, packed: bool) -> None:
    shapes = [(4, 2) if packed else (2, 2, 2), (2, 3), (2, 3), (G * 3, 2), (G * 3, 3), (G * 3,), (G * 3,)]
    x, hx, cx, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    sizes = torch.tensor([2, 1, 1]) if packed else None

    def function(x: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        inputs = ops.RNNInputs(x, hx, cx if mode == "lstm" else None, *weights, batch_sizes=sizes)
        return reference.rnn(inputs, ops.RNNOptions(mode, reverse))[: 4 if mode == "lstm" else 2]

    assert torch.autograd.gradcheck(function, (x, hx, cx, *weights))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("biases", [True, False])
def test_the_op_differentiates(backend: str, device: torch.device, reverse: bool, biases: bool) -> None:
    if backend == "torch":
        pytest.skip("not a backend of the op itself")
    shapes = [(3, 2, 2), (2, 3), (2, 3), (12, 2), (12, 3), (12,), (12,)][: 7 if biases else 5]
    tensors = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = (*tensors, *[None] * (7 - len(tensors)))
        return rnn(ops.RNNInputs(*full), ops.RNNOptions("lstm", reverse), backend, cells=True)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=not INTERPRETING, fast_mode=INTERPRETING)
    # Second derivatives are the reference's, whichever the backend.
    assert INTERPRETING or torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"layer_norm": True}], ids=str)
def test_layers_differentiate(name: str, options: dict[str, Any]) -> None:
    ours = getattr(nn, name)(2, 3, **options).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = dict(ours.named_parameters())

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(_flat(torch.func.functional_call(ours, dict(zip(weights, values, strict=True)), x)))

    arguments = (x, *(p.detach().requires_grad_() for p in weights.values()))
    # Along random directions: element by element it takes ten times as long, and the op is checked so.
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_frozen_weights_and_inputs() -> None:
    ours, theirs = _pair("LSTM", 5, 7)
    x = torch.randn(4, 3, 5)
    for frozen in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l0"):
        for module in (ours, theirs):
            module.zero_grad()
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name != frozen)
            module(x)[0].sin().sum().backward()
            assert getattr(module, frozen).grad is None
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    for module in (ours, theirs):
        module.requires_grad_(False)
    y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(m(v)[0].sin().sum(), v)[0] for m, v in ((ours, y), (theirs, z))))


# The first is so small that sequences are shared, the second so large that units are, the third packs no weights.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("T", "B", "H"), [(5, 40, 33), (4, 7, 200), (2, 3, 200)])
def test_the_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype, T: int, B: int, H: int) -> None:
    ours, _ = _pair(name, 19, H, dtype=dtype)
    x, states = torch.randn(T, B, 19).to(dtype), _states(name, 1, B, H, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(_results(ours, x, states))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_expanded_and_strided_inputs(name: str) -> None:
    ours, theirs = _pair(name, 5, 7)
    for x in (torch.randn(4, 1, 5).expand(4, 3, 5), torch.randn(8, 3, 10)[::2, :, ::2]):
        for got, want in zip(_flat(ours(x)), _flat(theirs(x)), strict=True):
            torch.testing.assert_close(got, want)


def test_weight_norm_and_tied_weights() -> None:
    ours, theirs = _pair("LSTM", 7, 7)
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 7)
    for got, want in zip(_results(ours, x, None), _results(theirs, x, None), strict=True):
        torch.testing.assert_close(got, want)


def test_truncated_backpropagation() -> None:
    ours, theirs = _pair("LSTM", 5, 7)
    x = torch.randn(8, 3, 5)
    losses = []
    for module in (ours, theirs):
        state = None
        for part in x.split(4):
            y, state = module(part, state)
            (y**2).mean().backward()
            state = tuple(s.detach() for s in state)
        losses.append([p.grad for p in module.parameters()])
    for got, want in zip(*losses, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms() -> None:
    ours, theirs = _pair("LSTM", 3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    got, want = (torch.func.grad(lambda x, m=m: m(x)[0].sin().sum())(x) for m in (ours, theirs))
    torch.testing.assert_close(got, want)
    batch = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    each = torch.stack([theirs(one)[0] for one in batch])
    torch.testing.assert_close(torch.func.vmap(lambda x: ours(x)[0])(batch), each)


def test_compiled_in_one_graph() -> None:
    ours, _ = _pair("LSTM", 5, 7, num_layers=2)
    x = torch.randn(4, 3, 5)
    eager = _results(ours, x, None)
    compiled = torch.compile(lambda x, hx: ours(x, hx), fullgraph=True)
    compiled.parameters = ours.parameters  # type: ignore[attr-defined]
    for got, want in zip(_results(compiled, x, None), eager, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 4}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, options: dict[str, Any], packed: bool, dtype: torch.dtype) -> None:
    if "proj_size" in options and name != "LSTM":
        pytest.skip("torch projects LSTM only")
    ours, theirs = _pair(name, 5, 7, **options)
    x: Any = torch.randn(9, 3, 5)
    x = pack_padded_sequence(x, torch.tensor([9, 4, 1])) if packed else x
    with torch.autocast("cpu", dtype=dtype):
        if name == "LSTM" and dtype == torch.float16 and not packed and "proj_size" not in options:
            # torch has no such LSTM, and says so.
            with pytest.raises(RuntimeError, match="could not create"):
                ours(x)
            return
        got = _results(ours, x, None)
        try:
            own = _results(theirs, x, None)
        except RuntimeError as error:
            # oneDNN has no bfloat16 LSTM on a CPU without AVX-512; ours has.
            if "could not create" not in str(error):
                raise
            own = None
        served = dtype == torch.bfloat16 and "proj_size" not in options
        assert not NATIVE or llmkern.explain(ours, x).backends == (("native",) if served else ("torch",))
    right = _results(theirs.double(), x.double(), None)
    for a, b, c in zip(got, right, own or got, strict=True):
        assert a.dtype == c.dtype
        # Of an order of 1, and rounded to bf16 somewhere.
        error, torchs = ((t.double() - b).abs().max() for t in (a, c))
        scale = max(1.0, float(b.abs().max()))
        assert error <= 2 * (torchs if own else 2**-7 * scale) + 2**-8 * scale


@pytest.mark.skipif(not NATIVE, reason="no native build")
@pytest.mark.kernels
@pytest.mark.parametrize("kernel", kernels("lstm"))
def test_a_backward_inside_autocast_is_the_one_outside(kernel: str) -> None:
    module, x = nn.LSTM(6, 7), torch.randn(5, 3, 6, requires_grad=True)
    with llmkern.backend(kernel):
        y = module(x)[0]
        inputs = (x, *module.parameters())
        outside = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(map(torch.equal, inside, outside))


def test_explain() -> None:
    lstm, gru = nn.LSTM(5, 7), nn.GRU(5, 7)
    x = torch.randn(4, 3, 5)
    assert llmkern.explain(lstm, x).backends == ("native",)
    # Sizes at which torch was measured to be faster, which is true of its oneDNN only.
    large = torch.randn(4, 32, 5)
    with torch.no_grad():
        told = llmkern.explain(lstm, large)
        assert told.backends == ("torch",)
        assert "torch's forward without gradients is faster at this size" in str(told)
        assert llmkern.explain(nn.LSTM(5, 7, proj_size=3), large).backends == ("native",)
    assert llmkern.explain(lstm, large).backends == ("native",)
    for module in (nn.RNN(5, 7), gru):
        assert llmkern.explain(module, pack_padded_sequence(x, torch.tensor([4, 2, 1]))).backends == ("native",)
        with torch.autocast("cpu", dtype=torch.float16):
            told = llmkern.explain(module, x)
        assert told.backends == ("torch",)
        assert "does not serve autocast" in str(told)
        with (
            torch.autocast("cpu", dtype=torch.float16),
            llmkern.backend("native"),
            pytest.raises(BackendError, match="backend 'native' was forced"),
        ):
            module(x)
