"""Cross-entropy: every backend against the fp64 reference, and torch's semantics value for value."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from checks import FLOATS, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
import llmkern.functional as F
import llmkern.nn as nn
from llmkern import reference
from llmkern._groups import LossOptions

KERNELS = kernels("cross_entropy")
# 1: a softmax of one; 3 and 17: less and more than a vector of fp32 in SSE; 1000: tails in AVX-512; 4099: a prime.
SIZES = [(1, 1), (2, 3), (5, 17), (3, 1000), (2, 4099)]


def _inputs(N: int, V: int, dtype: torch.dtype, ignored: bool = True) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(N, V)).to(dtype)
    target = torch.randint(V, (N,))
    if ignored and N > 1:
        target[N // 2] = -100
    return logits, target


def _both(function: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its product with a fixed random cotangent."""
    x = logits.detach().clone().requires_grad_()
    loss = function(x, *args, **kwargs)
    cotangent = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, x, cotangent)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "V"), SIZES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, N: int, V: int, reduction: str, smoothing: float, weighted: bool
) -> None:
    logits, target = _inputs(N, V, dtype)
    weight = (0.5 + torch.rand(V)).to(dtype) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got = _both(F.cross_entropy, logits, target, weight, **options)
    own = _both(TF.cross_entropy, logits, target, weight, **options)
    exact = _both(TF.cross_entropy, logits.double(), target, None if weight is None else weight.double(), **options)
    # With one class the gradient is 0: the difference of terms as large as the smoothing.
    scale = smoothing if V == 1 else 0
    for ours, theirs, right in zip(got, own, exact, strict=True):
        assert_accurate(ours, right, theirs, scale=scale)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "extra",
    [
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        {"logit_scale": -0.7},
        {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_language_model_options(
    kernel: str, dtype: torch.dtype, extra: dict[str, float], reduction: str, smoothing: float
) -> None:
    logits, target = _inputs(7, 130, dtype)
    token_weight = torch.rand(7).to(dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing, **extra}
    with llmkern.backend(kernel):
        got = _both(F.cross_entropy, logits, target, token_weight=token_weight, **options)
    with llmkern.backend("reference"):
        own = _both(F.cross_entropy, logits, target, token_weight=token_weight, **options)
        exact = _both(F.cross_entropy, logits.double(), target, token_weight=token_weight.double(), **options)
    for ours, theirs, right in zip(got, own, exact, strict=True):
        assert_accurate(ours, right, theirs)


def test_language_model_options_by_hand() -> None:
    logits, target = _inputs(4, 9, torch.float64, ignored=False)
    z = 3 * torch.tanh(2 * logits / 3)
    by_hand = TF.cross_entropy(z, target, reduction="none") + 0.1 * z.logsumexp(-1) ** 2
    tokens = torch.rand(4, dtype=torch.float64)
    got = F.cross_entropy(logits, target, z_loss=0.1, softcap=3.0, logit_scale=2.0, token_weight=tokens)
    torch.testing.assert_close(got, (by_hand * tokens).sum() / tokens.sum())


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 6, 3), (2, 6, 3, 5)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shapes(shape: tuple[int, ...], soft: bool, reduction: str) -> None:
    logits = torch.randn(shape)
    dim = 0 if len(shape) == 1 else 1
    outer = shape[:dim] + shape[dim + 1 :]
    target = torch.randn(shape).softmax(dim) if soft else torch.randint(6, outer)
    got = _both(F.cross_entropy, logits, target, reduction=reduction)
    own = _both(TF.cross_entropy, logits, target, reduction=reduction)
    exact = _both(TF.cross_entropy, logits.double(), target.double() if soft else target, reduction=reduction)
    for ours, theirs, right in zip(got, own, exact, strict=True):
        assert_accurate(ours, right, theirs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_probabilities_in_the_reference(weighted: bool, smoothing: float) -> None:
    logits, target = (
        torch.randn(5, 7, dtype=torch.float64),
        torch.randn(5, 7, dtype=torch.float64).softmax(-1),
    )
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    got = reference.cross_entropy(logits, target, weight, LossOptions(label_smoothing=smoothing))[0]
    want = TF.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(got, want)
    mixed = F.cross_entropy(logits, target, weight, label_smoothing=smoothing, z_loss=0.1)
    torch.testing.assert_close(mixed, (want + 0.1 * logits.logsumexp(-1) ** 2).mean())


# What torch gives where the arithmetic has no obvious answer; each row is (logits, target, options).
INF = float("inf")
EDGES = {
    "empty mean": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), {}),
    "empty sum": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), {"reduction": "sum"}),
    "empty none": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), {"reduction": "none"}),
    "all ignored": (torch.randn(3, 4), torch.full((3,), -100), {}),
    "all ignored sum": (torch.randn(3, 4), torch.full((3,), -100), {"reduction": "sum"}),
    "ignore_index in range": (torch.randn(3, 4), torch.tensor([1, 2, 1]), {"ignore_index": 1}),
    "zero weights": (torch.randn(3, 4), torch.tensor([1, 2, 1]), {"weight": torch.zeros(4)}),
    "-inf elsewhere": (torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([0]), {}),
    "-inf elsewhere, smoothed": (
        torch.tensor([[0.0, -INF, 1.0]]),
        torch.tensor([0]),
        {"label_smoothing": 0.1},
    ),
    "-inf target": (torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([1]), {}),
    "all -inf": (torch.full((2, 3), -INF), torch.tensor([0, 1]), {}),
    "+inf": (torch.tensor([[0.0, INF, 1.0]]), torch.tensor([0]), {}),
    "nan": (
        torch.tensor([[0.0, float("nan"), 1.0], [1.0, 2.0, 3.0]]),
        torch.tensor([0, 1]),
        {"reduction": "none"},
    ),
    "large": (
        torch.tensor([[1e4, -1e4, 3e38], [-3e38, 0.0, -1.0]]),
        torch.tensor([0, 2]),
        {"reduction": "none"},
    ),
    "certain": (torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]), {}),
    "uint8": (torch.randn(3, 4), torch.tensor([1, 2, 3], dtype=torch.uint8), {}),
    "smoothing 1": (torch.randn(3, 4), torch.tensor([1, 2, 3]), {"label_smoothing": 1.0}),
    "legacy": (torch.randn(3, 4), torch.tensor([1, 2, 3]), {"size_average": False}),
    "legacy none": (torch.randn(3, 4), torch.tensor([1, 2, 3]), {"reduce": False}),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", EDGES)
def test_edges_are_torchs(backend: str, name: str) -> None:
    logits, target, options = EDGES[name]
    got, own = (_both(function, logits, target, **options) for function in (F.cross_entropy, TF.cross_entropy))
    for ours, theirs in zip(got, own, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


WRONG = {
    "target out of range": lambda f: f(torch.randn(3, 4), torch.tensor([0, 4, 1])),
    "negative target": lambda f: f(torch.randn(3, 4), torch.tensor([0, -1, 1])),
    "target shape": lambda f: f(torch.randn(3, 4), torch.tensor([0, 1])),
    "target dtype": lambda f: f(torch.randn(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)),
    "integer logits": lambda f: f(torch.ones(3, 4, dtype=torch.int64), torch.tensor([0, 1, 2])),
    "no classes": lambda f: f(torch.randn(3, 0), torch.tensor([0, 1, 2])),
    "scalar logits": lambda f: f(torch.randn(()), torch.tensor(0)),
    "weight size": lambda f: f(torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(3)),
    "weight dtype": lambda f: f(torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(4, dtype=torch.float64)),
    "weight wants a gradient": lambda f: f(
        torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2]), torch.ones(4, requires_grad=True)
    ),
    "smoothing": lambda f: f(torch.randn(3, 4), torch.tensor([0, 1, 2]), label_smoothing=1.5),
    "reduction": lambda f: f(torch.randn(3, 4), torch.tensor([0, 1, 2]), reduction="median"),
    "probabilities and ignore_index": lambda f: f(torch.randn(3, 4), torch.rand(3, 4), ignore_index=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_torchs(name: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        WRONG[name](TF.cross_entropy)
    with pytest.raises(theirs.type) as ours:
        WRONG[name](F.cross_entropy)
    assert str(ours.value) == str(theirs.value)


def test_token_weight_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"token_weight: got shape \(2,\), expected that of the losses, \(3,\)"):
        F.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), token_weight=torch.ones(2))


def test_a_target_out_of_range_touches_nothing(backend: str) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    for bad in (4, -1, 2**62, -(2**62)):
        with pytest.raises(IndexError):
            F.cross_entropy(logits, torch.tensor([0, bad, 1]))
    assert logits.grad is None


def test_inputs_are_not_written(backend: str) -> None:
    logits, target = _inputs(5, 17, torch.float32)
    before = logits.clone()
    _both(F.cross_entropy, logits, target)
    x = logits.requires_grad_()
    F.cross_entropy(x, target).backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "strided"])
def test_non_contiguous_logits(kind: str) -> None:
    logits = {
        "transposed": torch.randn(17, 5).t(),
        "expanded": torch.randn(1, 17).expand(5, 17),
        "strided": torch.randn(10, 34)[::2, ::2],
    }[kind]
    target = torch.randint(17, (5,))
    for ours, theirs in zip(
        _both(F.cross_entropy, logits, target), _both(TF.cross_entropy, logits, target), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_backward_twice_and_scaled() -> None:
    """The gradient made in the forward is used once, if it fits; every other backward is as right."""
    logits, target = _inputs(9, 33, torch.float32)
    want = _both(TF.cross_entropy, logits, target, reduction="mean")[1]
    x = logits.clone().requires_grad_()
    loss = F.cross_entropy(x, target)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, retain_graph=True)[0]
    third = torch.autograd.grad(loss, x, torch.tensor(3.0))[0]
    plain = torch.autograd.grad(TF.cross_entropy(x, target), x)[0]
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, 3 * plain)
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    torch.testing.assert_close(second, plain)
    assert want.shape == plain.shape


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(options: dict[str, float], reduction: str) -> None:
    logits, target = _inputs(3, 5, torch.float64)
    x = logits.requires_grad_()

    def function(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms() -> None:
    logits, target = _inputs(4, 6, torch.float64)
    for transform in (torch.func.grad, torch.func.hessian):
        got, want = (transform(lambda x, f=f: f(x, target))(logits) for f in (F.cross_entropy, TF.cross_entropy))
        torch.testing.assert_close(got, want)
    batch = torch.randn(3, 4, 6, dtype=torch.float64)
    got, want = (
        torch.func.vmap(torch.func.grad(lambda x, f=f: f(x, target)))(batch)
        for f in (F.cross_entropy, TF.cross_entropy)
    )
    torch.testing.assert_close(got, want)


def test_compiled_values_are_the_eager_ones() -> None:
    logits, target = _inputs(6, 37, torch.float32)
    compiled = torch.compile(F.cross_entropy, fullgraph=True)
    for ours, eager in zip(_both(compiled, logits, target), _both(F.cross_entropy, logits, target), strict=True):
        torch.testing.assert_close(ours, eager)


def test_autocast_computes_in_fp32() -> None:
    logits, target = _inputs(6, 37, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = _both(F.cross_entropy, logits, target), _both(TF.cross_entropy, logits, target)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    logits, target = _inputs(23, 4099, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(_both(F.cross_entropy, logits, target, reduction="sum"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("V", [50257, 128256])
def test_large_vocabularies(V: int) -> None:
    logits, target = _inputs(3, V, torch.float32)
    got, own = _both(F.cross_entropy, logits, target), _both(TF.cross_entropy, logits, target)
    exact = _both(TF.cross_entropy, logits.double(), target)
    for ours, theirs, right in zip(got, own, exact, strict=True):
        assert_accurate(ours, right, theirs)


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(0, 6),
    V=st.integers(1, 70),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.1, 5.0, 80.0]),
)
def test_any_size(N: int, V: int, seed: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, target = scale * torch.randn(N, V, generator=g), torch.randint(V, (N,), generator=g)
    got, own = (_both(f, logits, target, reduction="none") for f in (F.cross_entropy, TF.cross_entropy))
    exact = _both(TF.cross_entropy, logits.double(), target, reduction="none")
    for ours, theirs, right in zip(got, own, exact, strict=True):
        assert_accurate(ours, right, theirs)


def test_modules() -> None:
    weight = torch.rand(6)
    loss = nn.CrossEntropyLoss(weight, ignore_index=2, label_smoothing=0.1, z_loss=0.1, softcap=4.0)
    logits, target = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 4])
    want = F.cross_entropy(logits, target, weight, ignore_index=2, label_smoothing=0.1, z_loss=0.1, softcap=4.0)
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(module(logits, target), want)
    tokens = torch.rand(5)
    expected = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=2,
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=4.0,
        token_weight=tokens,
    )
    torch.testing.assert_close(loss(logits, target, tokens), expected)
    theirs = torch.nn.CrossEntropyLoss(weight)
    theirs.load_state_dict(nn.CrossEntropyLoss(weight).state_dict())
    torch.testing.assert_close(nn.NLLLoss()(logits.log_softmax(-1), target), TF.cross_entropy(logits, target))


def test_explain_tells_the_backend() -> None:
    logits, target = _inputs(3, 5, torch.float32)
    native = llmkern.dispatch.unavailable("native") is None
    assert llmkern.explain(F.cross_entropy, logits, target).backends == ("native" if native else "torch",)
    both = llmkern.explain(F.cross_entropy, logits, logits.softmax(-1), z_loss=0.1)
    assert both.backends == ("native" if native else "reference",)
    with llmkern.backend("torch"), pytest.raises(llmkern.dispatch.BackendError, match="z_loss"):
        F.cross_entropy(logits, target, z_loss=0.1)
