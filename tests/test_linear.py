"""The linear layer: every backend against torch and fp64, values, derivatives of every kind, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch

OP = "linear"
NATIVE = dispatch.unavailable("native") is None
# (rows, I, O): one of each, tails, the paths for few rows and for one column, a block of k and one more.
SIZES = ((1, 1, 1), (3, 5, 7), (1, 300, 40), (50, 33, 1), (17, 257, 65), (130, 70, 300))


def run(linear: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """y and the gradients of all arguments."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def compare(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dy = torch.randn(*x.shape[:-1], weight.shape[0], device=x.device).to(x.dtype)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    right = run(F.linear, *wide, dy)  # type: ignore[arg-type]
    got, own = run(LF.linear, x, weight, bias, dy), run(F.linear, x, weight, bias, dy)
    for a, b, c in zip(got, right, own, strict=True):
        # In fp64 torch is the reference, and rounds as much as we do.
        assert_accurate(a, b, c, ulps=32 if a.dtype == torch.float64 else 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(backend: str, device: torch.device, dtype: torch.dtype, bias: bool) -> None:
    for N, I, O in SIZES:
        x, weight = torch.randn(N, I, device=device).to(dtype), torch.randn(O, I, device=device).to(dtype)
        compare(x, weight, torch.randn(O, device=device).to(dtype) if bias else None)


def test_a_deep_product_adds_its_bias_once(backend: str, device: torch.device) -> None:
    """More k than one pass takes; low precision then sums in a scratch of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = torch.randn(40, 6500), torch.randn(9, 6500), 100 * torch.randn(9)
        compare(*(t.to(device, dtype) for t in (x, weight, bias)))


@settings(max_examples=25, deadline=None)
@given(
    outer=st.lists(st.integers(1, 5), max_size=3),
    I=st.integers(1, 70),
    O=st.integers(1, 70),
    strided=st.booleans(),
    bias=st.booleans(),
)
def test_any_shape_and_stride(outer: list[int], I: int, O: int, strided: bool, bias: bool) -> None:
    x = torch.randn(*outer[::-1], 2 * I, dtype=torch.double)[..., ::2] if strided else torch.randn(*outer, I).double()
    weight = torch.randn(I, O, dtype=torch.double).t() if strided else torch.randn(O, I, dtype=torch.double)
    with llmkern.backend("native" if NATIVE else "reference"):
        compare(x, weight, torch.randn(1, dtype=torch.double).expand(O) if bias else None)


def test_derivatives_of_every_kind(backend: str, device: torch.device) -> None:
    x, weight, bias = (torch.randn(*s, dtype=torch.double, device=device) for s in ((5, 3), (4, 3), (4,)))
    arguments = tuple(t.requires_grad_() for t in (x, weight, bias))
    assert gradcheck(LF.linear, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(LF.linear, arguments)
    # Only some of them: the others' products are not formed.
    for i in range(3):
        some = tuple(t.detach().requires_grad_(j == i) for j, t in enumerate(arguments))
        assert gradcheck(LF.linear, some)
        assert gradgradcheck(LF.linear, some)

    def loss(f: Any, x: Tensor, weight: Tensor) -> Tensor:
        return f(x, weight, bias).square().sum()

    points = (x.detach(), weight.detach())
    for transform in (
        lambda f: torch.func.grad(lambda x, w: loss(f, x, w), (0, 1))(*points),
        lambda f: torch.func.vmap(torch.func.grad(lambda x, w: loss(f, x[None], w), 1), (0, None))(*points),
        lambda f: torch.func.jvp(lambda x, w: loss(f, x, w), points, points),
        lambda f: torch.func.hessian(lambda x: loss(f, x, points[1]))(points[0]),
    ):
        torch.testing.assert_close(transform(LF.linear), transform(F.linear))


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
def test_the_number_of_threads_changes_no_bit() -> None:
    def results(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            g = torch.Generator().manual_seed(4)
            x, weight, bias, dy = (torch.randn(s, generator=g) for s in ((301, 130), (517, 130), (517,), (301, 517)))
            with llmkern.backend("native"):
                return run(LF.linear, x, weight, bias, dy)
        finally:
            torch.set_num_threads(before)

    for one, many in zip(results(1), results(3), strict=True):
        assert torch.equal(one, many)


def test_the_module_is_torchs(backend: str) -> None:
    for arguments in ((5, 7), (5, 7, False), (300, 1)):
        torch.manual_seed(2)
        theirs = torch.nn.Linear(*arguments)
        torch.manual_seed(2)
        ours = lnn.Linear(*arguments)
        assert isinstance(ours, torch.nn.Linear)
        assert repr(ours) == repr(theirs)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
        x = torch.randn(2, 3, arguments[0])
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


def test_auto_takes_the_kernel_where_it_gains() -> None:
    def backends(rows: int, dtype: torch.dtype) -> tuple[str, ...]:
        x, weight = torch.randn(rows, 64).to(dtype), torch.randn(256, 64).to(dtype)
        return llmkern.explain(LF.linear, x, weight).backends

    assert backends(1, torch.float32) == ("torch",)
    assert backends(256, torch.float32) == (("native",) if NATIVE else ("torch",))
    assert backends(256, torch.bfloat16) == ("torch",)
    # A kernel would be called once for every element of the batch.
    mapped = torch.func.vmap(LF.linear, (0, None))
    assert llmkern.explain(mapped, torch.randn(2, 256, 64), torch.randn(256, 64)).backends == ("torch",)
    with torch.autocast("cpu", torch.bfloat16):
        assert backends(256, torch.float32) == ("torch",)
        assert LF.linear(torch.randn(256, 64), torch.randn(256, 64)).dtype == torch.bfloat16


def test_nan_infinity_and_nothing(backend: str) -> None:
    x = torch.randn(6, 4)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    weight, bias = torch.randn(5, 4), torch.tensor([1.0, float("-inf"), 0.0, float("nan"), 2.0])
    torch.testing.assert_close(LF.linear(x, weight, bias), F.linear(x, weight, bias), equal_nan=True)
    for shape, rows in (((0, 4), 5), ((2, 0), 5), ((3, 4), 0)):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(rows, shape[-1], requires_grad=True)
        for got, want in zip(
            run(LF.linear, x, weight, torch.ones(rows), torch.ones(shape[0], rows)),
            run(F.linear, x, weight, torch.ones(rows), torch.ones(shape[0], rows)),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(3, 4), torch.ones(5, 3), None),
        (torch.ones(3, 4), torch.ones(5, 4), torch.ones(4)),
        (torch.ones(3, 4), torch.ones(5, 4), torch.ones(5, 1)),
        (torch.ones(3, 4), torch.ones(5, 4, dtype=torch.double), None),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(5, 4), None),
        (torch.ones(()), torch.ones(5, 4), None),
        (torch.ones(3, 4), torch.ones(2, 5, 4), None),
    ],
)
def test_errors_are_torchs(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    said = []
    for linear in (LF.linear, F.linear):
        with pytest.raises(Exception) as error:  # noqa: PT011
            linear(x, weight, bias)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
def test_the_native_op_refuses_what_does_not_fit() -> None:
    from llmkern import native

    x, weight, bias, dy = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5), torch.ones(3, 5)
    for arguments in (
        (x, torch.ones(5, 3), None),
        (x, weight.double(), None),
        (x, weight, torch.ones(4)),
        (x, weight, bias.double()),
        (x.t(), weight, None),
        (torch.ones(3), weight, None),
    ):
        with pytest.raises(ValueError, match="expected"):
            native.linear_forward(*arguments)
    for bad in (torch.ones(3, 4), torch.ones(2, 5), dy.double(), torch.ones(5, 3).t()):
        with pytest.raises(ValueError, match="expected"):
            native.linear_backward(bad, x, weight, True, True)


def test_compiled_values_are_the_eager_ones(backend: str) -> None:
    x, weight, bias = torch.randn(20, 33), torch.randn(17, 33), torch.randn(17)
    dy = torch.randn(20, 17)
    compiled = torch.compile(LF.linear, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, x, weight, bias, dy), run(LF.linear, x, weight, bias, dy), strict=True):
        torch.testing.assert_close(got, want)


def test_opcheck(backend: str) -> None:
    if backend in ("torch", "reference"):
        pytest.skip("no op of its own")
    x, weight, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    ops = torch.ops.llmkern
    torch.library.opcheck(ops.linear_forward.default, (x, weight, bias, backend))
    torch.library.opcheck(ops.linear_backward.default, (torch.randn(4, 5), x, weight, True, False, backend))
