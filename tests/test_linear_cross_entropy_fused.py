"""The fused linear + cross-entropy: chunks, ignored rows, what is computed and what is not, and its memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import llmkern
import llmkern.functional as F
import llmkern.nn as nn
from llmkern import dispatch

pytestmark = pytest.mark.kernels
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": -0.7}
# Bytes of a chunk of 4 rows of 97 logits in fp32, and more than enough for all.
SMALL, LARGE = 4 * 97 * 4, 1 << 26
ROWS, DTYPES = (9, (torch.float32, torch.bfloat16)) if INTERPRETING else (29, FLOATS)


@pytest.fixture(autouse=True, params=kernels("linear_cross_entropy"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on each kernel backend."""
    with llmkern.backend(request.param):
        yield request.param


def case(
    N: int, dtype: torch.dtype, ignored: float = 0.3, soft: bool = False, H: int = 19, V: int = 97
) -> tuple[list[Tensor], Tensor]:
    """x, linear_weight, linear_bias, and the target."""
    leaves = [torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype) / H**0.5, torch.randn(V).to(dtype)]
    target = torch.randint(V, (N,)).where(torch.rand(N) >= ignored, -100)
    return leaves, torch.randn(N, V).softmax(1).to(dtype) if soft else target


def composed(x: Tensor, w: Tensor, b: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with llmkern.backend("reference"):
        options.pop("workspace", None)
        return F.cross_entropy(TF.linear(x, w, b), target, outputs=("lse", "entropy"), **options)[:3]


def fused(x: Tensor, w: Tensor, b: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return F.linear_cross_entropy(x, w, target, linear_bias=b, outputs=("lse", "entropy"), **options)[:3]


def derivatives(function: Callable[..., Any], leaves: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    """Outputs, and gradients of all leaves and of probabilities, for cotangents that are the same in each call."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    target = target.detach().clone().requires_grad_(target.is_floating_point())
    outputs = function(*leaves, target, **options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g).to(t) for t in outputs]
    wanted = [*leaves, *[target] * target.requires_grad]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


@pytest.mark.parametrize("workspace", [SMALL, LARGE])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_and_chunks(dtype: torch.dtype, reduction: str, ignored: float, workspace: int) -> None:
    leaves, target = case(ROWS, dtype, ignored)
    options = {"reduction": reduction, **ALL_OPTIONS}
    expected = derivatives(composed, [t.double() for t in leaves], target, **options)
    own = derivatives(composed, leaves, target, **options)
    got = derivatives(fused, leaves, target, workspace=workspace, **options)
    for a, e, o in zip(got, expected, own, strict=True):
        assert_accurate(a.to(o.dtype), e, o, ulps=8)
    if ignored == 1:
        assert all(not t.any() for t in got)


@pytest.mark.parametrize("workspace", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities(dtype: torch.dtype, workspace: int) -> None:
    leaves, target = case(13, dtype, soft=True)
    weight = 0.5 + torch.rand(97).to(dtype)
    options = {"weight": weight, "reduction": "mean", **ALL_OPTIONS}
    expected = derivatives(
        composed, [t.double() for t in leaves], target.double(), **{**options, "weight": weight.double()}
    )
    own = derivatives(composed, leaves, target, **options)
    got = derivatives(fused, leaves, target, workspace=workspace, **options)
    for a, e, o in zip(got, expected, own, strict=True):
        assert_accurate(a.to(o.dtype), e, o, ulps=8)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives(reduction: str, soft: bool) -> None:
    leaves, target = case(4, torch.float64, soft=soft, H=2, V=3)
    if soft:
        leaves.append(target)

    def function(x: Tensor, w: Tensor, b: Tensor, t: Tensor = target) -> tuple[Tensor, ...]:
        return fused(x, w, b, t, reduction=reduction, workspace=50, **ALL_OPTIONS)

    moving = [t.requires_grad_() for t in leaves]
    assert gradcheck(function, moving, check_forward_ad=not INTERPRETING)
    # The second derivatives are the reference's.
    assert INTERPRETING or gradgradcheck(function, moving)


def test_outputs_of_every_place_of_k_dimensions() -> None:
    x, w, b = torch.randn(5, 4), torch.randn(7, 2, 3, 4), torch.randn(7, 2, 3)
    target = torch.randint(7, (5, 2, 3))
    logits = TF.linear(x, w.reshape(42, 4), b.flatten()).reshape(5, 7, 2, 3)
    names = ("lse", "entropy", "argmax", "accuracy")
    got = F.linear_cross_entropy(x, w, target, linear_bias=b, outputs=names, z_loss=0.1)
    for a, e in zip(got, F.cross_entropy(logits, target, outputs=names, z_loss=0.1), strict=True):
        torch.testing.assert_close(a, e)


@pytest.fixture
def calls(kernel: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, bool]]]:
    """Per function, what each call was asked for."""
    namespace, seen = dispatch.load(kernel), dict[str, list[dict[str, bool]]]()
    for name in ("linear_cross_entropy_forward", "linear_cross_entropy_backward"):
        function, kept = getattr(namespace, name), seen.setdefault(name, [])

        def call(*args: Any, function: Any = function, kept: Any = kept) -> Any:
            kept.append(dict(zip(("x", "weight", "bias", "target"), args[-4:], strict=True)))
            return function(*args)

        monkeypatch.setattr(namespace, name, call)
    return seen


def test_only_the_gradients_that_are_needed(calls: dict[str, list[dict[str, bool]]]) -> None:
    """A frozen weight costs no product, evaluation makes no gradient, and a plain backward makes nothing anew."""
    leaves, target = case(11, torch.float32)
    x, w, b = leaves
    forward, backward = calls.values()
    F.linear_cross_entropy(x, w, target, linear_bias=b)
    assert not any(forward[-1].values())
    for wanted in ((0,), (1,), (2,), (0, 1, 2)):
        operands = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        loss = F.linear_cross_entropy(operands[0], operands[1], target, linear_bias=operands[2])
        assert list(forward[-1].values()) == [i in wanted for i in range(4)]
        (3 * loss).backward()
        assert [t.grad is not None for t in operands] == [i in wanted for i in range(3)]
        assert not backward
        with torch.no_grad():
            F.linear_cross_entropy(operands[0], operands[1], target, linear_bias=operands[2])
        assert not any(forward[-1].values())
    each = F.linear_cross_entropy(x.requires_grad_(), w, target, reduction="none")
    assert not any(forward[-1].values())
    each.sum().backward()
    assert list(backward[-1].values()) == [True, False, False, False]


def test_tied_weights() -> None:
    """The embedding's weight is the output layer's: both gradients meet in one leaf."""
    tokens, target = torch.randint(97, (23,)), torch.randint(97, (23,))
    embedding = nn.Embedding(97, 19)
    with llmkern.backend("auto"):
        x = embedding(tokens)
    loss = F.linear_cross_entropy(x, embedding.weight, target)
    loss.backward()
    weight = embedding.weight.detach().clone().requires_grad_()
    TF.cross_entropy(TF.linear(TF.embedding(tokens, weight), weight), target).backward()
    torch.testing.assert_close(embedding.weight.grad, weight.grad)


def test_autocast_takes_the_kernel(kernel: str) -> None:
    """The usual case of mixed precision: a bf16 input from the layers before, a weight in fp32."""
    leaves, target = case(11, torch.float32)
    rounded = [t.bfloat16() for t in leaves]
    for x in (leaves[0], rounded[0]):
        w, b = (t.clone().requires_grad_() for t in leaves[1:])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            explanation = llmkern.explain(F.linear_cross_entropy, x, w, target, linear_bias=b)
            loss = F.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1, weight=torch.ones(97))
        assert explanation.backends == (kernel,)
        assert loss.dtype == torch.float32
        loss.backward()
        wide = [t.double().requires_grad_() for t in rounded]
        expected = TF.cross_entropy(TF.linear(*wide), target, label_smoothing=0.1)
        own = TF.cross_entropy(TF.linear(*rounded).float(), target, label_smoothing=0.1)
        assert_accurate(loss, expected, own)
        dw, db = torch.autograd.grad(expected, wide[1:])
        assert w.grad.dtype == torch.float32
        for got, want in ((w.grad, dw), (b.grad, db)):
            torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-7 * float(want.abs().max()))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [40 * 1009 * 4, 1 << 26])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, workspace: int) -> None:
    leaves, target = case(157, dtype, H=70, V=1009)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(derivatives(fused, leaves, target, workspace=workspace, reduction="mean"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_target_out_of_range_touches_nothing() -> None:
    (x, w, _), target = case(9, torch.float32)
    x.requires_grad_()
    for bad in (97, -1, 2**62, -(2**62)):
        target[4] = bad
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            F.linear_cross_entropy(x, w, target)
    with pytest.raises(ValueError, match="workspace: got 0, expected a positive number of bytes"):
        F.linear_cross_entropy(x, w, target, workspace=0)


MEMORY = """
import resource, torch, llmkern.functional as F
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
H, V = 32, 40000
w = torch.randn(V, H).requires_grad_()
def run(N):
    x = torch.randn(N, H).requires_grad_()
    F.linear_cross_entropy(x, w, torch.randint(V, (N,))).backward()
    w.grad = None
    return peak()
first = run(2)
print(*(run(N) - first for N in (1000, 2000, 4000)))
"""


@pytest.mark.not_interpreted
def test_memory_does_not_grow_with_the_rows() -> None:
    """The whole logits of the last size have 640 MB, and their gradient as much."""
    process = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120)
    grown = [int(n) for n in process.stdout.split()]
    inputs = 2 * 4000 * 32 * 4
    assert grown[0] <= (64 << 20) + (16 << 20)  # the workspace, and packed operands
    assert grown[2] - grown[0] <= inputs + (8 << 20)
