"""Embedding, positions, token types, norm and dropout in one: every backend against the fp64 reference and torch."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from input_layers import MODELS, composed, exact, operands, run, run_exact
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import llmkern
import llmkern.functional as LF
from llmkern import dispatch

OP = "fused_embedding"
KERNELS = kernels(OP)
NATIVE = dispatch.unavailable("native") is None
TABLES = ("weight", "position_weight", "token_type_weight")
needs_native = pytest.mark.skipif(not NATIVE, reason="needs the native library")


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_values_and_gradients(backend: str, model: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    # Columns: none but a tail, one vector, vectors and a tail; 7 x 9 tokens of 11, so that all repeat.
    few = (3, 131) if index_dtype == torch.int64 else (37,)
    for D in few if INTERPRETING else (1, 3, 16, 37, 131):
        if D == 1 and "norm" in MODELS[model]:
            continue  # a norm of one element: the difference of equal numbers, over the root of eps
        tensors, options = operands(model, dtype, D=D)
        input = torch.randint(11, (7, 9), dtype=index_dtype)
        dout = torch.randn(7, 9, D).to(dtype)
        expected = run_exact(dout, tensors, input, **options)
        theirs = run(composed, dout, tensors, input, **options)
        ours = run(LF.fused_embedding, dout, tensors, input, **options)
        for a, b, c in zip(ours, expected, theirs, strict=True):
            assert_accurate(a, b, c)
        if "padding_idx" in options:
            assert not ours[1][options["padding_idx"]].any()


@pytest.mark.kernels
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_dropout_is_the_references(model: str) -> None:
    """The mask of a seed is the same in every backend and in `dropout`; the gradient goes where the output is."""
    for dtype in FLOATS[::2] if INTERPRETING else FLOATS:
        tensors, options = operands(model, dtype, D=67)
        input, dout = torch.randint(11, (8, 9)), torch.randn(8, 9, 67).to(dtype)
        for p in (0.3, 1.0):
            torch.manual_seed(5)
            keep = LF.dropout(torch.ones(8, 9, 67), p) != 0
            assert p == 1.0 or abs(keep.double().mean() - (1 - p)) < 0.02
            expected = run_exact(dout, tensors, input, dropout=p, keep=keep, **options)
            for backend in (*KERNELS, "reference"):
                torch.manual_seed(5)
                with llmkern.backend(backend):
                    ours = run(LF.fused_embedding, dout, tensors, input, dropout=p, **options)
                assert not ours[0][~keep].any()
                assert p == 1.0 or (ours[0][keep] != 0).double().mean() > 0.99
                for a, b in zip(ours, expected, strict=True):
                    # Of narrow dtypes the gradient at the sum is rounded once more than the result.
                    if p < 1:
                        assert_accurate(a, b, ulps=16)
                    else:
                        assert not a.any()
            torch.manual_seed(5)
            for unchanged in ({"training": False}, {"dropout": 0.0}):
                keywords = {"dropout": p, **unchanged}
                without = LF.fused_embedding(input, **tensors, **options, **keywords)
                assert torch.equal(without, LF.fused_embedding(input, **tensors, **options))


def test_dropped_infinities_are_nan_as_in_torch(backend: str) -> None:
    weight = torch.full((3, 64), float("inf"))
    out = LF.fused_embedding(torch.tensor([0, 1, 2]), weight, dropout=0.5)
    assert 48 < out.isnan().sum() < 144
    assert set(out[~out.isnan()].tolist()) == {float("inf")}


def test_positions_and_types_of_any_shape(backend: str) -> None:
    tensors, options = operands("bert", torch.float32)
    input = torch.randint(11, (2, 3, 5))
    dout = torch.randn(2, 3, 5, 37)
    for shape in ((), (1,), (5,), (3, 1), (3, 5), (2, 1, 5), (1, 3, 5), (2, 3, 5)):
        positions = torch.randint(12, shape, dtype=torch.int32)
        token_types = torch.randint(2, shape[::-1] if len(shape) == 1 else shape)
        keywords = {"positions": positions, "token_types": token_types, **options}
        expected = run_exact(dout, tensors, input, **keywords)
        for a, b in zip(run(LF.fused_embedding, dout, tensors, input, **keywords), expected, strict=True):
            assert_accurate(a, b, ulps=32)
    # One token, and no tokens; views of all operands.
    scalar = LF.fused_embedding(torch.tensor(4), **tensors, **options)
    assert_accurate(scalar, exact(torch.tensor([4]), tensors, **options)[0], ulps=16)
    for shape in ((0, 9), (9, 0), (0,)):
        results = run(LF.fused_embedding, torch.empty(*shape, 37), tensors, torch.zeros(shape).long(), **options)
        assert results[0].shape == (*shape, 37)
        assert all(not g.any() for g in results[1:])
    views = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
    args = (input.transpose(0, 2), input.transpose(0, 2) % 12)
    a, b = (LF.fused_embedding(args[0], positions=args[1], **t, **options) for t in (views, tensors))
    assert torch.equal(a, b)


@pytest.mark.kernels
@settings(max_examples=6 if INTERPRETING else 60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_combination(data: st.DataObject, seed: int) -> None:
    """Backends agree on every combination of parts, in fp64."""
    draw, g = data.draw, torch.Generator().manual_seed(seed)
    V, D, B, L = draw(st.integers(1, 40)), draw(st.integers(2, 40)), draw(st.integers(0, 5)), draw(st.integers(0, 6))
    sizes: dict[str, tuple[int, ...]] = {"weight": (V, D)}
    if draw(st.booleans()):
        sizes["position_weight"] = (L + draw(st.integers(0, 3)), D)
    if draw(st.booleans()):
        sizes["token_type_weight"] = (draw(st.integers(1, 3)), D)
    norm = draw(st.sampled_from([None, "layer", "rms"]))
    for name in ("norm_weight", "norm_bias"):
        if norm and draw(st.booleans()):
            sizes[name] = (D,)
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.double) for name, shape in sizes.items()}
    options = {
        "scale": draw(st.sampled_from([1.0, -0.5, 16.0])),
        "norm": norm,
        "dropout": draw(st.sampled_from([0.0, 0.4])),
        "padding_idx": draw(st.one_of(st.none(), st.integers(-V, V - 1))),
        "scale_grad_by_freq": draw(st.booleans()),
    }
    input = torch.randint(V, (B, L), generator=g)
    dout = torch.randn(B, L, D, generator=g, dtype=torch.double)
    results = []
    for name in (*KERNELS, "reference"):
        torch.manual_seed(seed)
        with llmkern.backend(name):
            results.append(run(LF.fused_embedding, dout, tensors, input, **options))
    for a, b in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("norm", "dtype"), [("layer", torch.float32), ("rms", torch.bfloat16)])
def test_rows_of_every_length(kernel: str, norm: str, dtype: torch.dtype) -> None:
    """Lengths around those at which kernels take fewer rows, more threads, or a row in parts."""
    for D in (65, 300, 1025, 4096, 4097) if INTERPRETING else (65, 300, 1024, 2049, 4096, 4097, 9000):
        shapes = {"weight": (3, D), "position_weight": (5, D), "norm_weight": (D,), "norm_bias": (D,)}
        tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        input, dout = torch.tensor([[2, 0, 0, 1, 2]]), torch.randn(1, 5, D).to(dtype)
        torch.manual_seed(7)
        keep = LF.dropout(torch.ones(1, 5, D), 0.2) != 0
        options = {"norm": norm, "scale": 2.0, "dropout": 0.2}
        torch.manual_seed(7)
        with llmkern.backend(kernel):
            ours = run(LF.fused_embedding, dout, tensors, input, **options)
        for a, b in zip(ours, run_exact(dout, tensors, input, keep=keep, **options), strict=True):
            assert_accurate(a, b, ulps=16)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_number_of_tokens(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the tokens, and runs of one row that are summed in chunks: one less, as many, one more, several."""
    if kernel == "triton":
        # So that shares grow with the tokens at a size that is quick.
        monkeypatch.setattr(importlib.import_module("llmkern.kernels.fused_embedding"), "PARTITIONS", 4)
    tensors, options = operands("bert", torch.float32, V=3, D=7)
    tensors["position_weight"] = torch.randn(131, 7)
    for B, L in ((1, 15), (16, 1), (1, 17), (43, 3), (4, 67)):
        input, dout = torch.randint(3, (B, L)), torch.randn(B, L, 7)
        keywords = {"token_types": torch.randint(2, (L,)), "positions": torch.arange(L - 1, -1, -1) // 2}
        for given_rows in ({}, keywords) if L == 67 else ({},):
            results = []
            for _ in range(2):
                with llmkern.backend(kernel):
                    results.append(run(LF.fused_embedding, dout, tensors, input, **given_rows, **options))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            for a, b in zip(results[0], run_exact(dout, tensors, input, **given_rows, **options), strict=True):
                assert_accurate(a, b, ulps=64)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_thread_count(dtype: torch.dtype) -> None:
    tensors, options = operands("bert", dtype, V=300)
    tensors["position_weight"] = torch.randn(701, 37).to(dtype)
    input, dout = torch.randint(300, (9, 701)), torch.randn(9, 701, 37).to(dtype)
    types = torch.randint(2, (9, 701))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            keywords = {"token_types": types, "dropout": 0.2, **options}
            with llmkern.backend("native"):
                results.append(run(LF.fused_embedding, dout, tensors, input, **keywords))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("model", ["gpt2", "bert", "rms"])
def test_only_wanted_gradients(backend: str, model: str) -> None:
    """Frozen operands get none, and the others the same as without freezing."""
    tensors, options = operands(model, torch.float32)
    input, dout = torch.randint(11, (4, 9)), torch.randn(4, 9, 37)
    every = dict(zip(tensors, run(LF.fused_embedding, dout, tensors, input, **options)[1:], strict=True))
    for name in tensors:
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        LF.fused_embedding(input, **leaves, **options).backward(dout)
        assert torch.equal(leaves[name].grad, every[name])
        assert all(t.grad is None for n, t in leaves.items() if n != name)


@pytest.mark.parametrize("model", MODELS)
def test_derivatives(backend: str, model: str) -> None:
    if backend == "torch":
        pytest.skip("torch's own")
    tensors, options = operands(model, torch.double, V=5, D=3)
    options.pop("padding_idx", None), options.pop("scale_grad_by_freq", None)
    options["eps"] = 1e-3
    leaves = [t.requires_grad_() for t in tensors.values()]
    input = torch.tensor([[0, 3, 3], [4, 3, 0]])

    def function(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return LF.fused_embedding(input, **dict(zip(tensors, values, strict=True)), **options, dropout=0.3)

    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=INTERPRETING)
    assert gradgradcheck(function, leaves, fast_mode=INTERPRETING)


@pytest.mark.kernels
def test_padding_and_frequency_in_second_derivatives() -> None:
    """With them the backward is no derivative of the forward, but has its own; what reaches ``weight`` obeys them."""
    tensors, _ = operands("bert", torch.double, V=5, D=3)
    weight, others = tensors.pop("weight").requires_grad_(), tensors
    input = torch.tensor([[0, 3, 3], [4, 3, 0]])
    dout, ddweight = torch.randn(2, 3, 3, dtype=torch.double, requires_grad=True), torch.randn_like(weight)
    for options in ({"padding_idx": 3}, {"scale_grad_by_freq": True}):

        def pullback(dout: Tensor, options: dict[str, Any] = options) -> Tensor:
            out = LF.fused_embedding(input, weight, **others, norm="layer", eps=1e-3, **options)
            return torch.autograd.grad(out, weight, dout, create_graph=True)[0]

        results = []
        for backend in (*KERNELS, "reference"):
            with llmkern.backend(backend):
                assert gradcheck(pullback, dout, fast_mode=INTERPRETING)
                results.append(torch.autograd.grad(pullback(dout), weight, ddweight)[0])
        torch.testing.assert_close(results[0], results[-1])
        for backend in KERNELS:
            # Forward over reverse: the same factors, once.
            tangent, move = torch.randn_like(dout), torch.randn_like(weight)

            def gradient(dout: Tensor, weight: Tensor, options: dict[str, Any] = options) -> Tensor:
                def out(weight: Tensor) -> Tensor:
                    return LF.fused_embedding(input, weight, **others, norm="layer", eps=1e-3, **options)

                return torch.func.vjp(out, weight)[1](dout)[0]

            points, step = (dout.detach(), weight.detach()), 1e-6
            with llmkern.backend(backend):
                _, got = torch.func.jvp(gradient, points, (tangent, move))
                ends = [gradient(points[0] + s * step * tangent, points[1] + s * step * move) for s in (1, -1)]
            torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(backend: str) -> None:
    tensors, options = operands("bert", torch.double, V=5, D=4)
    weight, names = tensors["weight"], list(tensors)
    if backend == "reference":
        del options["padding_idx"]  # there it is a detached row, which does not move in forward mode either
    inputs = torch.randint(5, (3, 6))

    def loss(values: tuple[Tensor, ...], input: Tensor) -> Tensor:
        keywords = {**dict(zip(names, values, strict=True)), **options, "eps": 1e-3}
        return LF.fused_embedding(input, **keywords).sin().sum()

    def by_hand(values: tuple[Tensor, ...], input: Tensor) -> Tensor:
        keywords = {**options, "eps": 1e-3}
        return exact(input, dict(zip(names, values, strict=True)), **keywords).sin().sum()

    values = tuple(tensors.values())
    tangents = tuple(torch.randn_like(t) for t in values)
    transforms = [
        lambda f: torch.func.vmap(f, in_dims=(None, 0))(values, inputs),
        lambda f: torch.func.grad(f)(values, inputs),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(values, inputs),
        lambda f: torch.func.jvp(lambda v: f(v, inputs), (values,), (tangents,)),
        lambda f: torch.func.hessian(lambda w: f((w, *values[1:]), inputs[0]))(weight),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(loss), transform(by_hand))


def test_tables_may_change_before_a_linear_backward(backend: str) -> None:
    """As torch's embedding; with a norm the gradient depends on them, and autograd says that they changed."""
    input, dout = torch.tensor([1, 0, 1]), torch.randn(3, 4)
    for norm in (None, "layer"):
        weight = torch.randn(3, 4, requires_grad=True)
        out = LF.fused_embedding(input, weight, norm=norm)
        with torch.no_grad():
            weight.mul_(2)
        if norm is None or backend in ("torch", "reference"):
            out.backward(dout)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward(dout)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiles_in_one_graph(backend: str, dropout: float) -> None:
    if dropout and backend != "torch":
        # A forced backend that cannot serve raises; `auto` takes torch's functions.
        backend = "auto"
    torch.compiler.reset()
    tensors, options = operands("bert", torch.float32)
    input, dout = torch.randint(11, (4, 9)), torch.randn(4, 9, 37)

    def lookup(input: Tensor, **leaves: Tensor) -> Tensor:
        return LF.fused_embedding(input, **leaves, **options, dropout=dropout)

    with llmkern.backend(backend):
        compiled = run(torch.compile(lookup, fullgraph=True, backend="aot_eager"), dout, tensors, input)
        if dropout:
            assert 0.15 < (compiled[0] == 0).double().mean() < 0.35
        else:
            for a, b in zip(compiled, run(lookup, dout, tensors, input), strict=True):
                assert torch.equal(a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", KERNELS or ["reference"])
def test_autocast_is_torchs(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors, options = operands("bert", dtype)
        input = torch.randint(11, (4, 9))
        with torch.autocast("cpu", torch.bfloat16), llmkern.backend(backend):
            ours, theirs = LF.fused_embedding(input, **tensors, **options), composed(input, **tensors, **options)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=0.05)


def test_mixed_dtypes_are_torchs() -> None:
    tensors, _ = operands("bert", torch.bfloat16)
    tensors["position_weight"] = tensors["position_weight"].float()
    tensors["norm_weight"], tensors["norm_bias"] = tensors["norm_weight"].float(), tensors["norm_bias"].float()
    input = torch.randint(11, (4, 9))
    explanation = llmkern.explain(LF.fused_embedding, input, norm="layer", **tensors)
    assert explanation.backends == ("torch",)
    assert "mixed arguments" in str(explanation)
    assert LF.fused_embedding(input, norm="layer", **tensors).dtype == torch.float32
