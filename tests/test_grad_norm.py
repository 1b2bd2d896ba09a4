"""Gradient clipping against torch's, dense and sparse, in every dtype."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from checks import FLOATS, INTERPRETING, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern import dispatch, optim, reference

OP = "grad_norm"
KERNELS = kernels(OP)
NATIVE = dispatch.unavailable("native") is None
# A scalar, nothing at all, tails of a vector and of four, chunks of 32768 and their neighbours.
SHAPES = ((), (0,), (7,), (67,), (32767,), (2, 32769))


def with_grads(dtype: torch.dtype, shapes: Any = SHAPES, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    params = [torch.zeros(shape, dtype=dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(dtype)
    return params


def with_rows(dtype: torch.dtype, coalesced: bool) -> list[Tensor]:
    """A dense gradient beside a sparse one that names rows twice."""
    dense, table = with_grads(dtype, ((9,), (6, 5)))
    indices = torch.tensor([[4, 1, 4, 0, 4]])
    values = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    grad = torch.sparse_coo_tensor(indices, values, (6, 5), check_invariants=True)
    table.grad = grad.coalesce() if coalesced else grad
    return [dense, table]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("max_norm", [0.01, 3.0, 1e6])
def test_against_fp64(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    """The norm is the fp64 one, rounded once; a gradient is off by its own rounding."""
    ours, right = with_grads(dtype), [p.grad.double() for p in with_grads(dtype)]
    want = torch.cat([g.flatten() for g in right]).norm()
    got = optim.clip_grad_norm_(ours, max_norm)
    assert got.dtype == dtype
    assert got.shape == ()
    if backend != "torch":
        torch.testing.assert_close(got, want.to(dtype), rtol=1e-14 if dtype == torch.float64 else 0, atol=0)
        for p, g in zip(ours, right, strict=True):
            exact = g * min(1.0, max_norm / (want.item() + 1e-6))
            # fp64 has the rounding of its own reference.
            eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
            assert torch.all((p.grad.double() - exact).abs() <= max(eps, 1e-14) * exact.abs() + tiny * eps)


@pytest.mark.parametrize("norm_type", [2, 2.0, 1, 3.5, math.inf, "inf"])
def test_every_norm_is_torchs(norm_type: Any) -> None:
    for max_norm in (0.5, 1e6):
        # torch's infinity norm of nothing is an error.
        ours, theirs = (with_grads(torch.float64, [s for s in SHAPES if s != (0,)]) for _ in range(2))
        got = optim.clip_grad_norm_(ours, max_norm, norm_type)
        torch.testing.assert_close(got, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS or ["reference"])
@settings(max_examples=10 if INTERPRETING else 30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 60), max_size=3).map(tuple), max_size=5),
    max_norm=st.floats(0, 100),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_any_sizes(kernel: str, shapes: Any, max_norm: float, scale: float) -> None:
    ours, theirs = with_grads(torch.float64, shapes, scale), with_grads(torch.float64, shapes, scale)
    with llmkern.backend(kernel):
        got = optim.clip_grad_norm_(ours, max_norm)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-12, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_tensors_at_any_address(kernel: str, dtype: torch.dtype) -> None:
    """More than a launch takes, of every size around a block and a chunk, some not where a vector may begin."""
    sizes = [1, 0, 4095, 4096, 4097, 8191, 3, 32767, 32768, 32769, 17, 5, 65537, 1, 2, 40000, 7]
    memory = [torch.randn(n + k % 3).to(dtype) for k, n in enumerate(sizes)]
    before = [m.clone() for m in memory]
    tensors, copies = ([m[k % 3 :] for k, m in enumerate(whole)] for whole in (memory, before))
    functions = dispatch.load(kernel)
    want = reference.grad_norm(copies)
    torch.testing.assert_close(functions.grad_norm(tensors), want, rtol=1e-14, atol=0)
    assert torch.equal(functions.grad_norm(tensors), functions.grad_norm(tensors))
    # One after the other: what is another tensor's is no element of this one.
    for t, c in zip(tensors, copies, strict=True):
        torch.testing.assert_close(functions.grad_norm([t]), reference.grad_norm([c]), rtol=1e-14, atol=0)
    for factor in torch.tensor([0.3, 1.0], dtype=torch.float64):
        functions.scale_(tensors, factor)
        reference.scale_(copies, factor)
    assert all(torch.equal(m, b) for m, b in zip(memory, before, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_list_of_several_dtypes(kernel: str) -> None:
    tensors = [torch.randn(50).to(FLOATS[k % 4]) for k in range(11)]
    copies, functions = [t.clone() for t in tensors], dispatch.load(kernel)
    torch.testing.assert_close(functions.grad_norm(tensors), reference.grad_norm(copies), rtol=1e-14, atol=0)
    factor = torch.tensor(0.7, dtype=torch.float64)
    functions.scale_(tensors, factor), reference.scale_(copies, factor)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparse_gradients_are_clipped_as_the_dense_ones_they_stand_for(
    dtype: torch.dtype, norm_type: float, coalesced: bool
) -> None:
    ours, right = with_rows(dtype, coalesced), with_rows(torch.float64, coalesced)
    for p, q in zip(ours, right, strict=True):
        q.grad = (p.grad.to_dense() if p.grad.is_sparse else p.grad).double().clone()
    want = torch.nn.utils.clip_grad_norm_(right, 0.7, norm_type)
    kept = ours[1].grad
    got = optim.clip_grad_norm_(ours, 0.7, norm_type)
    assert ours[1].grad is kept
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got.double(), want, **tolerance)
    for p, q in zip(ours, right, strict=True):
        torch.testing.assert_close(p.grad.to_dense().double(), q.grad, **tolerance)


def test_sparse_gradients_need_a_positive_norm_type() -> None:
    with pytest.raises(ValueError, match="norm_type: got 0"):
        optim.clip_grad_norm_(with_rows(torch.float32, True), 1.0, 0)


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = with_grads(dtype)
            with llmkern.backend("native"):
                return [optim.clip_grad_norm_(params, 1.0), *(p.grad for p in params)]
        finally:
            torch.set_num_threads(before)

    for one, many in zip(run(1), run(3), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_norms_that_are_not_finite(backend: str, value: float) -> None:
    def start() -> list[Tensor]:
        params = with_grads(torch.float32, ((9,), (5,)))
        params[0].grad[3] = value
        return params

    messages = []
    for clip in (optim.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        params = start()
        with pytest.raises(RuntimeError, match="non-finite") as error:
            clip(params, 1.0, error_if_nonfinite=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params[1:], start()[1:], strict=True))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    ours, theirs = start(), start()
    got, want = optim.clip_grad_norm_(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(got, want, equal_nan=True)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_squares_that_leave_the_range_of_fp32(kernel: str) -> None:
    """torch's norm is infinite then, and its gradients are zero."""
    (p,) = with_grads(torch.float32, ((50,),), scale=1e25)
    exact = p.grad.double().norm()
    with llmkern.backend(kernel):
        norm = optim.clip_grad_norm_(p, 1.0)
    torch.testing.assert_close(norm, exact.float())
    torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))


def test_gradients_that_are_short_enough_are_not_written(backend: str) -> None:
    (p,) = with_grads(torch.float32, ((50,),))
    before = p.grad._version
    optim.clip_grad_norm_([p], 1e6)
    assert backend == "torch" or p.grad._version == before
    optim.clip_grad_norm_([p], 1e-6)
    assert p.grad._version > before


def test_several_dtypes_and_layouts_at_once() -> None:
    params = [*with_grads(torch.float32, ((9,), (4, 6))), *with_grads(torch.float64, ((5,),))]
    params[1].grad = params[1].grad.t().contiguous().t()
    params.append(torch.zeros(3, requires_grad=True))
    right = [p.grad.double().clone() for p in params[:3]]
    want = torch.cat([g.flatten() for g in right]).norm()
    got = optim.clip_grad_norm_(params, 0.5)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    for p, g in zip(params[:3], right, strict=True):
        torch.testing.assert_close(p.grad.double(), g * 0.5 / (want + 1e-6), rtol=1e-6, atol=0)


def test_arguments_are_torchs() -> None:
    clip, theirs = optim.clip_grad_norm_, torch.nn.utils.clip_grad_norm_
    assert clip([], 1.0).equal(theirs([], 1.0))
    assert clip([torch.ones(3, requires_grad=True)], 1.0).equal(torch.tensor(0.0))
    (p,) = with_grads(torch.float32, ((5,),))
    torch.testing.assert_close(clip(p, 1e6), p.grad.norm())
    params = with_grads(torch.float32)
    torch.testing.assert_close(clip(iter(params), 1.0), clip((p for p in with_grads(torch.float32)), 1.0))
    with pytest.warns(UserWarning, match="empty generator"):
        clip((p for p in []), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip(params, 1.0, foreach=False).isfinite()
    whole = torch.zeros(4, dtype=torch.complex64, requires_grad=True)
    whole.grad = torch.full((4,), 3 + 4j)
    torch.testing.assert_close(clip([whole], 1.0), torch.tensor(10.0))
    assert llmkern.nn.utils.clip_grad_norm_ is clip
