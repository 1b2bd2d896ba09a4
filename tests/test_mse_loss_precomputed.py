"""Squared error: the gradients that the forward precomputes, and what happens when another one comes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, assert_accurate, kernels
from test_mse_loss import run

import llmkern
import llmkern.functional as LF
from llmkern import dispatch

KERNELS = kernels("mse_loss")


@pytest.fixture(params=KERNELS)
def recomputed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """One entry for each call of the backward kernel; calls go to the kernels."""
    kernel, calls = dispatch.load(request.param), []
    backward = kernel.mse_loss_backward
    monkeypatch.setattr(kernel, "mse_loss_backward", lambda *args: (calls.append(True), backward(*args))[1])
    with llmkern.backend(request.param):
        yield calls


# What the kernel gets is contiguous; the gradients find their way back.
LAYOUTS = {
    "contiguous": lambda a, b: (a, b),
    "strided": lambda a, b: (a.t()[:, 1::2], b.t()[:, ::2]),
    "expanded": lambda a, b: (a, b[:1].expand_as(a)),
    "broadcast": lambda a, b: (a, b[0]),
}


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_the_forward(dtype: torch.dtype, reduction: str, layout: str, recomputed: list[bool]) -> None:
    """They are handed out once, to a plain backward of the loss itself; all others are computed anew."""
    for needs in ((True, True), (True, False), (False, True)):
        pair = [t.to(dtype).requires_grad_(need) for t, need in zip(torch.randn(2, 10, 14), needs, strict=True)]
        wanted = [t for t in pair if t.requires_grad]
        doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in pair]
        ours = LF.mse_loss(*LAYOUTS[layout](*pair), reduction=reduction)
        theirs = F.mse_loss(*LAYOUTS[layout](*pair), reduction=reduction)
        exact = F.mse_loss(*LAYOUTS[layout](*doubles), reduction=reduction)
        recomputed.clear()
        first = torch.autograd.grad(ours, wanted, retain_graph=True)
        assert not recomputed
        for count, factor in enumerate((1, 1, 3, -0.5), start=1):
            again = torch.autograd.grad(ours * factor, wanted, retain_graph=True)
            assert len(recomputed) == count
            torchs = torch.autograd.grad(theirs * factor, wanted, retain_graph=True)
            expected = torch.autograd.grad(exact * factor, [t for t in doubles if t.requires_grad], retain_graph=True)
            for f, a, t, e in zip(first, again, torchs, expected, strict=True):
                assert factor != 1 or torch.equal(f, a)
                assert_accurate(a, e, t)


@pytest.mark.kernels
def test_a_other_gradient(recomputed: list[bool]) -> None:
    x, t = (torch.randn(8193, requires_grad=True) for _ in range(2))
    # A kernel may find out by itself, and write the same gradients anew.
    corrects = hasattr(dispatch.load(*KERNELS), "mse_loss_correct_")
    for reduction, number in itertools.product(("mean", "sum"), (3.0, math.nan)):
        ours, theirs = (
            run(partial(f, reduction=reduction), (x, t), torch.tensor(number)) for f in (LF.mse_loss, F.mse_loss)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert len(recomputed) == (0 if corrects else 4)
    recomputed.clear()
    dx = torch.autograd.grad(LF.mse_loss(x, t), x, create_graph=True)[0]
    assert len(recomputed) == 1
    torch.testing.assert_close(torch.autograd.grad(dx.sum(), x)[0], torch.full_like(x, 2 / 8193))
    dead = LF.mse_loss(x * 1, t)
    torch.autograd.grad(dead * 0 + x.sum(), x)
    assert len(recomputed) == 2 - corrects


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_gradient_of_an_operand_that_changed(kernel: str) -> None:
    x = torch.randn(5, requires_grad=True)
    changed = x * 1
    with llmkern.backend(kernel):
        loss = LF.mse_loss(changed, torch.zeros(5))
    changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
