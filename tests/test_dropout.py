"""Dropout: the kernel against the reference bit for bit, the module against torch's rules."""

from __future__ import annotations

import llmkern.nn.functional as F
import pytest
import torch
from checks import kernels

import llmkern.nn as nn
from llmkern import reference
from llmkern.ops.dropout import dropout

KERNELS = kernels("dropout")


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dropout_is_the_references(kernel: str, dtype: torch.dtype) -> None:
    x = torch.randn(1003, 7).to(dtype)
    for p in (0.0, 0.3, 1.0):
        for seed in (0, 1, (1 << 62) - 1):
            got, want = (dropout(x, p, seed, where) for where in (kernel, "reference"))
            assert torch.equal(got, want)
            assert abs((got == 0).double().mean() - p) < 0.02
    a, b = (dropout(x, 0.5, seed, kernel) == 0 for seed in (1, 2))
    assert 0.45 < (a == b).double().mean() < 0.55
    # As torch's product with a mask: what is dropped and not finite is NaN.
    huge = dropout(torch.full((64,), float("inf")), 0.5, 3, kernel)
    assert torch.equal(huge.isnan(), dropout(torch.ones(64), 0.5, 3, kernel) == 0)
    assert set(huge[~huge.isnan()].tolist()) == {float("inf")}


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_differentiates(kernel: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    function = lambda x: dropout(x, 0.4, 9, kernel)  # noqa: E731
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_random_bits_are_even() -> None:
    index = torch.arange(1 << 16) + (1 << 32) - (1 << 15)
    bits = reference._random.random_bits(12345678901234, index, 1)
    for position in range(32):
        assert abs((bits >> position & 1).double().mean() - 0.5) < 0.01
    assert bits.unique().numel() > 65_000


def test_the_module_keeps_torchs_rules() -> None:
    x = torch.randn(50, 40, requires_grad=True)
    for ns in (nn, torch.nn):
        module = ns.Dropout(0.25)
        torch.manual_seed(4)
        y = module(x)
        torch.manual_seed(4)
        assert torch.equal(y, module(x))
        assert not torch.equal(y, module(x))
        kept = y != 0
        assert 0.7 < kept.double().mean() < 0.8
        torch.testing.assert_close(y[kept], x[kept] / 0.75)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, kept / 0.75)
        assert module.eval()(x) is x
        assert torch.equal(ns.Dropout(1.0)(x), torch.zeros_like(x))
        assert ns.Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)
        z = torch.ones(100)
        assert ns.Dropout(0.5, inplace=True)(z) is z
        assert (z == 0).any()
    assert repr(nn.Dropout(0.25)) == repr(torch.nn.Dropout(0.25))
    for p in (-0.1, 1.1):
        texts = []
        for function in (F.dropout, torch.nn.functional.dropout):
            with pytest.raises(ValueError, match="dropout probability") as error:
                function(x, p)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


def test_under_the_compiler_and_vmap() -> None:
    x = torch.ones(2000)
    for function in (
        torch.compile(lambda x: F.dropout(x, 0.5), backend="aot_eager", fullgraph=True),
        torch.func.vmap(lambda x: F.dropout(x, 0.5), randomness="different"),
    ):
        y = function(x)
        assert 0.4 < (y == 0).double().mean() < 0.6
        assert set(y.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("p", ["a", None, 1j, -1, 2, float("nan"), torch.tensor(2.0), 0.5])
@pytest.mark.parametrize("training", [True, False, 1, "yes"])
def test_errors_are_torchs(p: object, training: object) -> None:
    seen = []
    for f in (F.dropout, torch.nn.functional.dropout):
        try:
            f(torch.ones(3), p, training)  # type: ignore[arg-type]
            seen.append(None)
        except Exception as error:
            seen.append((type(error), str(error)))
    assert seen[0] == seen[1]
    assert (seen[1] is None) == (p == 0.5 and training in (True, False) and isinstance(training, bool))
