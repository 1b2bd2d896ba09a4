"""Embedding lookup: every backend against the fp64 reference and torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import reference

OP = "embedding"
KERNELS = kernels("embedding")
INDICES = (torch.int64, torch.int32)
# V, D, N: no columns, one, a vector's tail, several vectors and a tail, one row, more rows than a digit of
# the radix sort has (2^11), no indices.
SIZES = ((5, 0, 7), (5, 1, 7), (9, 3, 20), (10, 67, 33), (1, 16, 12), (5000, 9, 400), (4, 8, 0))


def run(function: Callable[..., Tensor], indices: Tensor, weight: Tensor, dout: Tensor, **keywords: Any) -> Any:
    """The rows and the weight's gradient."""
    weight = weight.detach().requires_grad_()
    out = function(indices, weight, **keywords)
    return out.detach(), torch.autograd.grad(out, weight, dout.to(out.dtype))[0]


def truth(indices: Tensor, weight: Tensor, dout: Tensor, padding_idx: int = -1, by_freq: bool = False) -> Any:
    """The same in fp64, one index at a time."""
    table, flat = weight.double(), indices.reshape(-1).tolist()
    dweight, rows = torch.zeros_like(table), dout.double().reshape(len(flat), weight.shape[1])
    for n, row in enumerate(flat):
        if row != padding_idx:
            dweight[row] += rows[n] / (flat.count(row) if by_freq else 1)
    return table[indices.long()], dweight


@pytest.mark.parametrize("index_dtype", INDICES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(backend: str, device: torch.device, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    for V, D, N in SIZES:
        weight = torch.randn(V, D, device=device).to(dtype)
        indices = torch.randint(V, (N,), device=device).to(index_dtype)
        dout = torch.randn(N, D, device=device).to(dtype)
        expected = truth(indices, weight, dout)
        ours, theirs = (run(f, indices, weight, dout) for f in (LF.embedding, F.embedding))
        assert torch.equal(ours[0], theirs[0])
        assert_accurate(ours[1], expected[1], theirs[1])


@pytest.mark.parametrize("by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1, -6])
def test_padding_and_frequency(backend: str, device: torch.device, padding_idx: int | None, by_freq: bool) -> None:
    V, D = 6, 5
    weight, indices = torch.randn(V, D, device=device), torch.randint(V, (4, 9), device=device)
    dout = torch.randn(4, 9, D, device=device)
    keywords = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq}
    ours, theirs = (run(f, indices, weight, dout, **keywords) for f in (LF.embedding, F.embedding))
    expected = truth(indices, weight, dout, -1 if padding_idx is None else padding_idx % V, by_freq)
    assert torch.equal(ours[0], theirs[0])
    assert_accurate(ours[1], expected[1], theirs[1])
    if padding_idx is not None:
        assert not ours[1][padding_idx].any()


def test_non_finite_rows_keep_their_gradients(backend: str, device: torch.device) -> None:
    weight = torch.tensor([[float("inf"), 1.0], [float("nan"), -float("inf")], [0.0, 2.0]], device=device)
    indices, dout = torch.tensor([0, 1, 1, 2, 2, 2], device=device), torch.randn(6, 2, device=device)
    for keywords in ({}, {"padding_idx": 1}, {"scale_grad_by_freq": True}):
        ours, theirs = (run(f, indices, weight, dout, **keywords) for f in (LF.embedding, F.embedding))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_hot_row_does_not_saturate(dtype: torch.dtype) -> None:
    """Where bf16 sums stop at 256 and fp16 sums at 2048, ours go on."""
    weight, count = torch.zeros(3, 5, dtype=dtype), 1000 if dtype == torch.bfloat16 else 5000
    indices, dout = torch.ones(count, dtype=torch.int64), torch.ones(count, 5, dtype=dtype)
    assert run(F.embedding, indices, weight, dout)[1][1, 0] < 0.9 * count
    for name in (*KERNELS, "reference"):
        with llmkern.backend(name):
            dweight = run(LF.embedding, indices, weight, dout)[1]
        assert torch.equal(dweight, torch.tensor([0, count, 0], dtype=dtype)[:, None].expand(3, 5))


def test_views_and_expanded_tensors(backend: str, device: torch.device) -> None:
    base, indices = torch.randn(12, 14, device=device), torch.randint(6, (5, 8), device=device)
    for weight in (base.t(), base[::2, 1:9:3], base[:1].expand(7, 14)):
        for index in (indices.t(), indices[1::2, ::3], indices[:, :1].expand(5, 6), indices[0, 0]):
            dout = torch.randn(weight.shape[1], device=device).expand(*index.shape, -1)
            expected = truth(index, weight, dout)
            ours, theirs = (run(f, index, weight, dout) for f in (LF.embedding, F.embedding))
            assert torch.equal(ours[0], theirs[0])
            assert_accurate(ours[1], expected[1], theirs[1])


@pytest.mark.kernels
@settings(max_examples=10 if INTERPRETING else 40, deadline=None)
@given(
    V=st.integers(1, 3000),
    D=st.integers(0, 40),
    shape=st.lists(st.integers(0, 7), max_size=3),
    padding=st.one_of(st.none(), st.integers(0, 5)),
    by_freq=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(V: int, D: int, shape: list[int], padding: int | None, by_freq: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator, dtype=torch.double)
    indices = torch.randint(V, shape, generator=generator)
    dout = torch.randn(*shape, D, generator=generator, dtype=torch.double)
    padding = None if padding is None else padding % V
    keywords = {"padding_idx": padding, "scale_grad_by_freq": by_freq}
    expected = run(F.embedding, indices, weight, dout, **keywords)
    for name in (*KERNELS, "reference"):
        with llmkern.backend(name):
            for a, b in zip(run(LF.embedding, indices, weight, dout, **keywords), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("index_dtype", INDICES, ids=str)
@pytest.mark.parametrize("bad", [-1, 6, -(2**31), 2**31 - 1])
def test_index_out_of_range(backend: str, index_dtype: torch.dtype, bad: int) -> None:
    """At the first and the last place, and in the second thread's share."""
    weight = torch.randn(6, 300, requires_grad=True)
    for place in (0, 150, 199):
        indices = torch.randint(6, (200,), dtype=index_dtype)
        indices[place] = bad
        with pytest.raises(IndexError, match="index out of range in self"):
            LF.embedding(indices, weight)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_kernel_checks_its_arguments(kernel: str) -> None:
    """autograd never passes such indices down; a caller of the op may."""
    for bad in (-1, 6, 2**40):
        with pytest.raises(IndexError, match="index out of range in self"):
            torch.ops.llmkern.embedding_backward(torch.randn(3, 4), torch.tensor([0, bad, 1]), 6, -1, False, kernel)
    with pytest.raises(ValueError, match="expected dout"):
        torch.ops.llmkern.embedding_backward(torch.randn(2, 4), torch.zeros(3).long(), 6, -1, False, kernel)
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.llmkern.embedding_forward(torch.randn(4, 6).t(), torch.zeros(3).long(), kernel)


@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.randn(3)},
        {"input": torch.zeros(3, dtype=torch.int16)},
        {"input": torch.zeros(3, dtype=torch.bool)},
        {"weight": torch.randn(6)},
        {"weight": torch.randn(6, 2, 2)},
        {"padding_idx": 6},
        {"padding_idx": -7},
        {"input": torch.tensor([0, 6])},
        {"sparse": True, "scale_grad_by_freq": True},
    ],
    ids=repr,
)
def test_errors_are_torchs(change: dict[str, Any]) -> None:
    weight = torch.randn(6, 2, requires_grad=True)
    call = {"input": torch.zeros(3, dtype=torch.int64), "weight": weight, **change}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.embedding(**call).sum().backward()
    with pytest.raises(theirs.type) as ours:
        LF.embedding(**call).sum().backward()
    assert str(ours.value) == str(theirs.value)


def test_derivatives(backend: str, device: torch.device) -> None:
    weight = torch.randn(5, 3, dtype=torch.double, device=device, requires_grad=True)
    indices = torch.tensor([[0, 3, 3], [4, 3, 0]], device=device)
    fast = {"fast_mode": INTERPRETING}
    assert gradcheck(lambda w: LF.embedding(indices, w), weight, check_forward_ad=True, check_batched_grad=True, **fast)
    assert gradgradcheck(lambda w: LF.embedding(indices, w), weight, **fast)
    # With padding or frequency the backward is no derivative of the forward, but has its own.
    for keywords in ({"padding_idx": 3}, {"scale_grad_by_freq": True}):
        if backend == "torch" and "scale_grad_by_freq" in keywords:
            continue  # torch's second derivative forgets the scale
        dout = torch.randn(2, 3, 3, dtype=torch.double, device=device, requires_grad=True)

        def pullback(dout: Tensor, keywords: dict[str, Any] = keywords) -> Tensor:
            return torch.autograd.grad(LF.embedding(indices, weight, **keywords), weight, dout, create_graph=True)[0]

        assert gradcheck(pullback, dout, **fast)
        assert gradgradcheck(pullback, dout, **fast)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(backend: str, device: torch.device) -> None:
    weights, indices = torch.randn(3, 5, 4, device=device), torch.randint(5, (3, 6), device=device)
    weight, index = weights[0], indices[0]
    for transform in (
        lambda f: torch.func.vmap(f, in_dims=(0, None))(indices, weight),
        lambda f: torch.func.vmap(f, in_dims=(1, 2))(indices, torch.stack([weight] * 6, 2)),
        lambda f: torch.func.vmap(f, in_dims=(None, 0))(index, weights),
        lambda f: torch.func.grad(lambda w: f(index, w).sin().sum())(weight),
        lambda f: torch.func.vmap(torch.func.grad(lambda w, i: f(i, w).sin().sum()))(weights, indices),
        lambda f: torch.func.jvp(lambda w: f(index, w), (weight,), (weights[1],)),
        lambda f: torch.func.hessian(lambda w: f(index, w).sin().sum())(weight),
        lambda f: torch.func.jacrev(lambda w: f(index, w))(weight),
    ):
        torch.testing.assert_close(transform(LF.embedding), transform(F.embedding))


@pytest.mark.parametrize(
    "keywords", [{}, {"padding_idx": -1}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=repr
)
def test_compiles_in_one_graph(backend: str, device: torch.device, keywords: dict[str, Any]) -> None:
    if "max_norm" in keywords and backend != "torch":
        pytest.skip("torch's way")
    torch.compiler.reset()
    weight, dout = torch.randn(6, 7, device=device), torch.randn(4, 5, 7, device=device)
    indices = torch.randint(6, (5, 4), device=device).t()

    def lookup(indices: Tensor, weight: Tensor) -> Tensor:
        return LF.embedding(indices, weight, **keywords)

    compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager")
    ours = run(compiled, indices, weight.clone(), dout)
    for a, b in zip(ours, run(lookup, indices, weight.clone(), dout), strict=True):
        assert torch.equal(a, b)


def test_reference_agrees_with_its_definition() -> None:
    weight, indices = torch.randn(5, 3), torch.tensor([2, 2, 0])
    assert torch.equal(reference.embedding(weight, indices), weight[indices])
    assert reference.embedding_row_scale(indices, 5, 0, True, weight).flatten().tolist() == [0.5, 0.5, 0.0]


CONSTRUCTORS = (
    {},
    {"padding_idx": 2},
    {"padding_idx": -1, "max_norm": 1.0},
    {"max_norm": 2.0, "norm_type": 1.0, "scale_grad_by_freq": True},
    {"sparse": True, "dtype": torch.double},
)


@pytest.mark.parametrize("keywords", CONSTRUCTORS, ids=repr)
def test_module_is_torchs(keywords: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = torch.nn.Embedding(6, 4, **keywords)
    torch.manual_seed(3)
    ours = lnn.Embedding(6, 4, **keywords)
    assert isinstance(ours, torch.nn.Embedding)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())
    indices = torch.randint(6, (3, 5))
    expected = theirs(indices)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(module) is lnn.Embedding
        torch.testing.assert_close(module(indices), expected)
    keywords = {k: v for k, v in keywords.items() if k != "dtype"}
    for freeze in (True, False):
        a, b = (
            m.Embedding.from_pretrained(ours.weight.detach().clone(), freeze=freeze, **keywords)
            for m in (lnn, torch.nn)
        )
        assert type(a) is lnn.Embedding
        assert repr(a) == repr(b)
        assert a.weight.requires_grad == b.weight.requires_grad == (not freeze)
        torch.testing.assert_close(a(indices), b(indices))
