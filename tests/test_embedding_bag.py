"""Embedding bags: every backend against a loop over bags in fp64, and torch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import reference

OP = "embedding_bag"
KERNELS = kernels("embedding_bag")
MODES = ("sum", "mean", "max")
# An empty bag first, in the middle and last; bag 3 repeats a row.
INDICES, OFFSETS = torch.tensor([1, 4, 1, 5, 0, 0, 2, 1]), torch.tensor([0, 0, 3, 4, 4, 8])


def truth(
    weight: Tensor, indices: Tensor, ends: list[int], mode: str, samples: Tensor | None, padding_idx: int
) -> Tensor:
    """Bag by bag and row by row; differentiable. `ends` has the end of every bag."""
    bags, begin = [], 0
    for end in ends:
        rows = [
            weight[indices[n]] * (1 if samples is None else samples[n])
            for n in range(begin, end)
            if indices[n] != padding_idx
        ]
        begin = end
        if not rows:
            bags.append(weight.new_zeros(weight.shape[1]))
        elif mode == "max":
            bags.append(torch.stack(rows).max(0).values)
        else:
            bags.append(sum(rows) / (len(rows) if mode == "mean" else 1))
    # The sum ties an all-empty call to the weight.
    return torch.stack(bags) + 0 * weight.sum()


def run(function: Any, weight: Tensor, samples: Tensor | None, dout: Tensor) -> list[Tensor]:
    """The bags and the gradients."""
    leaves = [t.detach().requires_grad_() for t in (weight, samples) if t is not None]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(backend: str, device: torch.device, mode: str, dtype: torch.dtype) -> None:
    # D: a vector's tail; blocks of eight vectors and of two, one vector and a tail (of sixteen lanes).
    for D in (189,) if INTERPRETING else (9, 189):
        check_values_and_gradients(backend, device, mode, dtype, D)


def check_values_and_gradients(backend: str, device: torch.device, mode: str, dtype: torch.dtype, D: int) -> None:
    weight, ends = torch.randn(6, D, device=device).to(dtype), [*OFFSETS[1:].tolist(), len(INDICES)]
    dout = torch.randn(len(ends), D, device=device).to(dtype)
    indices, offsets = INDICES.to(device), OFFSETS.to(device)
    for padding_idx in (None, 1, -1):
        for samples in (None, torch.randn(len(INDICES), device=device).to(dtype)):
            weighted_mean = samples is not None and mode == "mean"
            if samples is not None and (mode == "max" or (weighted_mean and backend == "torch")):
                continue

            def bags(f: Any, w: Tensor, s: Tensor | None = None, p: int | None = padding_idx) -> Tensor:
                return f(indices, w, offsets, mode=mode, per_sample_weights=s, padding_idx=p)

            def loop(w: Tensor, s: Tensor | None = None, p: int | None = padding_idx) -> Tensor:
                return truth(w, indices, ends, mode, s, -1 if p is None else p % 6)

            wide = None if samples is None else samples.double()
            expected = run(loop, weight.double(), wide, dout.double())
            # torch has no weighted mean.
            theirs = [None] * 3
            if not weighted_mean:
                theirs = run(lambda *a, b=bags: b(F.embedding_bag, *a), weight, samples, dout)
            ours = run(lambda *a, b=bags: b(LF.embedding_bag, *a), weight, samples, dout)
            for a, e, t in zip(ours, expected, theirs, strict=True):
                assert_accurate(a, e, t)


@pytest.mark.parametrize("mode", MODES)
def test_two_dimensional_input_and_last_offset(backend: str, device: torch.device, mode: str) -> None:
    weight, dout = torch.randn(6, 4, device=device), torch.randn(3, 4, device=device)
    indices = torch.randint(6, (5, 3), device=device).t()
    ends = torch.tensor([0, 5, 10, 15], device=device)
    expected = run(lambda w: F.embedding_bag(indices, w, mode=mode), weight, None, dout)
    for ours in (
        run(lambda w: LF.embedding_bag(indices, w, mode=mode), weight, None, dout),
        run(lambda w: LF.embedding_bag(indices.flatten(), w, ends[:-1], mode=mode), weight, None, dout),
        run(
            lambda w: LF.embedding_bag(indices.flatten(), w, ends, mode=mode, include_last_offset=True),
            weight,
            None,
            dout,
        ),
        run(lambda w: LF.embedding_bag(indices.int(), w, mode=mode), weight, None, dout),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
    samples = torch.randn(3, 5, device=device)
    torch.testing.assert_close(
        LF.embedding_bag(indices, weight, mode="sum", per_sample_weights=samples),
        F.embedding_bag(indices, weight, mode="sum", per_sample_weights=samples),
    )


def test_empty_calls(backend: str, device: torch.device) -> None:
    weight, nothing = torch.randn(6, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    for mode in MODES:
        assert LF.embedding_bag(nothing, weight, nothing, mode=mode).shape == (0, 4)
        bags = LF.embedding_bag(nothing, weight, torch.zeros(3, dtype=torch.int64, device=device), mode=mode)
        assert torch.equal(bags, torch.zeros(3, 4, device=device))


@pytest.mark.kernels
@settings(max_examples=8 if INTERPRETING else 30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    D=st.integers(1, 9),
    mode=st.sampled_from(MODES),
    padding=st.integers(-1, 3),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_bags(lengths: list[int], D: int, mode: str, padding: int, last: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight, indices = torch.randn(4, D, dtype=torch.double), torch.randint(4, (sum(lengths),))
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends if last else ends[:-1]])
    dout = torch.randn(len(lengths), D, dtype=torch.double)
    expected = run(lambda w: truth(w, indices, ends.tolist(), mode, None, padding), weight, None, dout)
    keywords = {"mode": mode, "include_last_offset": last, "padding_idx": None if padding < 0 else padding}
    for name in (*KERNELS, "torch", "reference"):
        with llmkern.backend(name):
            ours = run(lambda w: LF.embedding_bag(indices, w, offsets, **keywords), weight, None, dout)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_derivatives(backend: str, device: torch.device, mode: str) -> None:
    weight = torch.randn(6, 3, dtype=torch.double, device=device, requires_grad=True)
    samples = torch.randn(8, dtype=torch.double, device=device, requires_grad=True)
    indices, offsets = INDICES.to(device), OFFSETS.to(device)
    ours = backend != "torch"
    for keywords in [{"padding_idx": 1}, *[{}] * (not INTERPRETING)]:

        def bags(w: Tensor, s: Tensor | None = None, keywords: dict[str, Any] = keywords) -> Tensor:
            return LF.embedding_bag(indices, w, offsets, mode=mode, per_sample_weights=s, **keywords)

        weighted = mode == "sum" or (mode == "mean" and ours)
        arguments = (weight, samples) if weighted else (weight,)
        fast = {"fast_mode": INTERPRETING}
        assert gradcheck(bags, arguments, check_forward_ad=ours, check_batched_grad=ours, **fast)
        if not ours:
            continue
        assert gradgradcheck(bags, arguments, **fast)
        if weighted and not INTERPRETING:
            assert gradgradcheck(lambda s: bags(weight.detach(), s), samples, **fast)
            assert gradgradcheck(lambda w: bags(w, samples.detach()), weight, **fast)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_second_derivatives_leave_the_first_alone(kernel: str) -> None:
    """create_graph takes another way through backward; the gradients are the same."""
    weight, dout = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    for mode in MODES:
        with llmkern.backend(kernel):
            out = LF.embedding_bag(INDICES, weight, OFFSETS, mode=mode)
        first = torch.autograd.grad(out, weight, dout, retain_graph=True)[0]
        again = torch.autograd.grad(out, weight, dout, create_graph=True)[0]
        assert again.requires_grad
        assert not first.requires_grad
        torch.testing.assert_close(first, again)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_and_compile(backend: str) -> None:
    weight = torch.randn(6, 4)
    for mode in MODES:
        ours, theirs = (
            lambda w, f=f, mode=mode: f(INDICES, w, OFFSETS, mode=mode) for f in (LF.embedding_bag, F.embedding_bag)
        )
        gradient = torch.func.grad(lambda w, f=ours: f(w).sin().sum())(weight)
        torch.testing.assert_close(gradient, torch.func.grad(lambda w, f=theirs: f(w).sin().sum())(weight))
        stacked = torch.stack([weight, 2 * weight])
        torch.testing.assert_close(torch.func.vmap(ours)(stacked), torch.stack([theirs(w) for w in stacked]))
        torch.compiler.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        dout = torch.randn(6, 4)
        for a, b in zip(run(compiled, weight, None, dout), run(theirs, weight, None, dout), strict=True):
            torch.testing.assert_close(a, b)


def test_reference_ends_with_the_last_offset() -> None:
    """torch's mean and max count what lies behind the last offset; the reference does not."""
    weight, ends = torch.randn(6, 4, dtype=torch.double), [2, 5]
    for mode in MODES:
        ours = reference.embedding_bag(weight, INDICES, torch.tensor([0, *ends]), mode, None, True)
        torch.testing.assert_close(ours, truth(weight, INDICES, ends, mode, None, -1))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"mode": "max", "padding_idx": -1},
        {"mode": "sum", "max_norm": 1.0, "norm_type": 1.0, "scale_grad_by_freq": True},
        {"mode": "sum", "sparse": True, "include_last_offset": True, "dtype": torch.double},
    ],
    ids=repr,
)
def test_module_is_torchs(keywords: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = torch.nn.EmbeddingBag(6, 4, **keywords)
    torch.manual_seed(3)
    ours = lnn.EmbeddingBag(6, 4, **keywords)
    assert isinstance(ours, torch.nn.EmbeddingBag)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    expected = theirs(INDICES, OFFSETS)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(module) is lnn.EmbeddingBag
        torch.testing.assert_close(module(INDICES, OFFSETS), expected)
    keywords = {k: v for k, v in keywords.items() if k != "dtype"}
    a, b = (m.EmbeddingBag.from_pretrained(ours.weight.detach().clone(), **keywords) for m in (lnn, torch.nn))
    assert type(a) is lnn.EmbeddingBag
    assert repr(a) == repr(b)
    assert not a.weight.requires_grad
    torch.testing.assert_close(a(INDICES, OFFSETS), b(INDICES, OFFSETS))


def test_torchs_own_samples(backend: str) -> None:
    # torch has no ModuleInfo of EmbeddingBag.
    info = next(o for o in op_db if o.name == "nn.functional.embedding_bag")
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        if backend == "reference" and sample.kwargs.get("sparse"):
            continue
        # torch's OpInfo puts the weight first.
        weight, (indices, *rest) = sample.input.detach(), sample.args
        torch.testing.assert_close(
            LF.embedding_bag(indices, weight.clone(), *rest, **sample.kwargs),
            F.embedding_bag(indices, weight.clone(), *rest, **sample.kwargs),
        )
