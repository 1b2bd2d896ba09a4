"""Layer and root-mean-square normalisation: every backend against the fp64 reference and torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
from llmkern import dispatch

OP = "layer_norm"
KERNELS = kernels(OP)
NORMS = ("layer_norm", "rms_norm")
HALF = (torch.bfloat16, torch.float16)
# (N, D): one number, tails of vectors, groups of rows and chunks of 32 with their neighbours, rows longer than a block.
SIZES = ((1, 1), (1, 7), (3, 16), (5, 33), (33, 64), (67, 100), (131, 8), (2, 4099), (3, 9001))
needs_native = pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="needs the native library")


def affine(norm: str, size: int, dtype: torch.dtype, parts: str = "wb") -> list[Tensor | None]:
    """weight and, for a layer norm, bias; None where ``parts`` does not name it."""
    vectors = [torch.randn(size).to(dtype) if name in parts else None for name in "wb"]
    return vectors if norm == "layer_norm" else vectors[:1]


def run(
    function: Callable[..., Tensor], shape: Sequence[int], tensors: Sequence[Tensor | None], dy: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """The result and the gradients of all that is there."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, *vectors = tensors
    y = function(x, shape, *vectors, eps=eps)
    return y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype))


def compare(norm: str, tensors: Sequence[Tensor | None], shape: Sequence[int], eps: float = 1e-5) -> None:
    x = tensors[0]
    assert x is not None
    dy = torch.randn(x.shape, device=x.device).to(x.dtype)
    got = run(getattr(LF, norm), shape, tensors, dy, eps)
    doubles = [None if t is None else t.double() for t in tensors]
    expected = run(getattr(F, norm), shape, doubles, dy.double(), eps)
    theirs = run(getattr(F, norm), shape, tensors, dy, eps)
    # dx is a difference of terms that grow with 1 / deviation. In fp64 the reference rounds as well, and what it rounds
    # in a difference from the mean grows with the square.
    flat = x.double().flatten(x.dim() - len(shape))
    spread = flat.square().mean(-1) if norm == "rms_norm" else flat.var(-1, correction=0)
    sizes = [float(t.abs().max()) for t in (dy, *tensors) if t is not None]
    steep = float((spread + eps).rsqrt().max()) * max(1.0, *sizes) ** 2
    for k, (a, e, t) in enumerate(zip(got, expected, theirs, strict=True)):
        assert_accurate(a, e, t, ulps=8, scale=steep**2 if a.dtype == torch.float64 else steep * (k == 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients(backend: str, device: torch.device, norm: str, dtype: torch.dtype) -> None:
    for N, D in SIZES:
        for parts in ("wb", "w", "b", ""):
            if parts != "wb" and N * D > 5000:
                continue
            x = (torch.randn(N, D) * 3 + 1).to(dtype)
            compare(norm, [x, *affine(norm, D, dtype, parts)], (D,))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_float32_weights_of_16_bit_rows(backend: str, device: torch.device, norm: str, dtype: torch.dtype) -> None:
    for N, D in ((5, 33), (67, 100)):
        compare(norm, [torch.randn(N, D).to(dtype), *affine(norm, D, torch.float32)], (D,))


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS or ["reference"])
@settings(max_examples=10 if INTERPRETING else 40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    last=st.integers(1, 4),
    norm=st.sampled_from(NORMS),
)
def test_any_shape_and_stride(kernel: str, shape: list[int], order: Any, last: int, norm: str) -> None:
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    x = torch.randn(shape, dtype=torch.double).permute(permutation)
    normalized = x.shape[-min(last, len(shape)) :]
    vectors = [torch.randn(normalized[::-1], dtype=torch.double).permute(*range(len(normalized))[::-1])]
    vectors += [torch.randn(normalized, dtype=torch.double)] if norm == "layer_norm" else []
    with llmkern.backend(kernel):
        if x.numel():
            compare(norm, [x, *vectors], normalized)
        got = run(getattr(LF, norm), normalized, [x, *vectors], torch.ones_like(x), 1e-5)
    for a, e in zip(got, run(getattr(F, norm), normalized, [x, *vectors], torch.ones_like(x), 1e-5), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-9, atol=1e-9)


def test_the_variance_cancels_nothing(backend: str, device: torch.device) -> None:
    """The mean of the squares minus the square of the mean would be 0 or negative here."""
    x = torch.randn(4, 1000) + 4096
    got = LF.layer_norm(x, (1000,))
    assert_accurate(got, F.layer_norm(x.double(), (1000,)), F.layer_norm(x, (1000,)))
    assert float(got.var(-1, correction=0).sub(1).abs().max()) < 1e-3


def test_the_default_eps_is_torchs(backend: str, device: torch.device) -> None:
    for dtype in FLOATS:
        x = torch.full((2, 8), 1e-4, dtype=torch.float64).to(dtype)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        expected = F.rms_norm(x.double(), (8,), eps=eps)
        assert_accurate(LF.rms_norm(x, (8,)), expected, F.rms_norm(x, (8,)))
        assert_accurate(LF.layer_norm(x, (8,)), F.layer_norm(x.double(), (8,)), F.layer_norm(x, (8,)))


def test_nan_and_infinity_stay_in_their_rows(backend: str, device: torch.device) -> None:
    x = torch.randn(6, 19)
    x[1, 3], x[2, 4], x[4, 0], x[4, 1] = float("nan"), float("inf"), float("inf"), -float("inf")
    for norm in NORMS:
        vectors = affine(norm, 19, torch.float32)
        dy = torch.randn(6, 19)
        got, expected = (run(getattr(f, norm), (19,), [x, *vectors], dy, 1e-5) for f in (LF, F))
        for a, e in zip(got, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


def test_only_the_wanted_gradients_are_computed(backend: str, device: torch.device) -> None:
    x, w, b, dy = torch.randn(70, 33), torch.randn(33), torch.randn(33), torch.randn(70, 33)
    leaves = _leaves(x, w, b)
    wanted = torch.autograd.grad(LF.layer_norm(leaves[0], (33,), *leaves[1:]), leaves, dy)
    for k in range(3):
        points = [t.detach().requires_grad_(i == k) for i, t in enumerate((x, w, b))]
        (alone,) = torch.autograd.grad(LF.layer_norm(points[0], (33,), *points[1:]), (points[k],), dy)
        assert torch.equal(alone, wanted[k])


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS or ["reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_of_every_kind(kernel: str, norm: str) -> None:
    fast = {"fast_mode": True} if INTERPRETING else {}
    for parts in ("wb", "b", ""):
        tensors = [torch.randn(3, 5, dtype=torch.double), *affine(norm, 5, torch.double, parts)]
        places = [i for i, t in enumerate(tensors) if t is not None]

        def function(*points: Tensor, tensors: list[Any] = tensors, places: list[int] = places) -> Tensor:
            full = [points[places.index(i)] if i in places else None for i in range(len(tensors))]
            with llmkern.backend(kernel):
                return getattr(LF, norm)(full[0], (5,), *full[1:], eps=1e-3)

        points = [tensors[i].requires_grad_() for i in places]
        assert gradcheck(function, points, check_forward_ad=True, check_batched_grad=not INTERPRETING, **fast)
        assert gradgradcheck(function, points, check_fwd_over_rev=True, **fast)


@pytest.mark.kernels
@pytest.mark.not_interpreted
@pytest.mark.parametrize("kernel", KERNELS or ["reference"])
def test_transforms_and_the_compiler(kernel: str) -> None:
    x, w, b = (torch.randn(s, dtype=torch.double) for s in ((4, 6), (6,), (6,)))

    def function(f: Any) -> Callable[..., Tensor]:
        return lambda x, w, b: f.layer_norm(x, (6,), w, b).sin().sum() + f.rms_norm(x, (6,), w).cos().sum()

    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 2))(x, w, b),
        lambda f: torch.func.jvp(f, (x, w, b), (w.expand(4, 6), b, w)),
        lambda f: torch.func.hessian(f)(x, w, b),
        lambda f: torch.func.vmap(torch.func.grad(lambda r: f(r[None], w, b)))(x),
    ):
        expected = torch.utils._pytree.tree_leaves(transform(function(F)))
        for mode in (kernel, "auto"):
            with llmkern.backend(mode):
                got = torch.utils._pytree.tree_leaves(transform(function(LF)))
            for a, e in zip(got, expected, strict=True):
                torch.testing.assert_close(a, e)
    # Where torch's own function serves.
    compiled = torch.compile(torch.func.grad(function(LF)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, b), torch.func.grad(function(F))(x, w, b))
    with llmkern.backend(kernel):
        compiled = torch.compile(function(LF), backend="aot_eager", fullgraph=True, dynamic=True)
        for rows in (4, 7):
            leaves, others = _leaves(x[:1].repeat(rows, 1), w, b), _leaves(x[:1].repeat(rows, 1), w, b)
            got = torch.autograd.grad(compiled(*leaves), leaves)
            for a, e in zip(got, torch.autograd.grad(function(F)(*others), others), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS or ["reference"])
def test_the_ops_are_what_their_schemas_say(kernel: str) -> None:
    x, w, b = torch.randn(5, 7), torch.randn(7), torch.randn(7)
    forward, backward = torch.ops.llmkern.layer_norm_forward, torch.ops.llmkern.layer_norm_backward
    y, stats = forward(x, w, b, 1e-5, False, kernel)
    for rms in (False, True):
        torch.library.opcheck(forward, (x, w, None if rms else b, 1e-5, rms, kernel))
        for wants in (7, 5, 1, 2, 0):
            torch.library.opcheck(backward, (y, x, stats, w, b, 1e-5, rms, wants, kernel))


@needs_native
@pytest.mark.not_interpreted
@pytest.mark.parametrize("size", [(1003, 67), (40_000, 128)], ids=["cached", "streamed"])
def test_same_bits_for_any_thread_count(size: tuple[int, int]) -> None:
    threads, (N, D) = torch.get_num_threads(), size
    x, w, b, dy = torch.randn(N, D), torch.randn(D), torch.randn(D), torch.randn(N, D)
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with llmkern.backend("native"):
                results.append(
                    [
                        *run(LF.layer_norm, (D,), [x, w, b], dy, 1e-5),
                        *run(LF.rms_norm, (D,), [x, w], dy, 1e-5),
                    ]
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_an_input_that_changed_before_the_backward_is_refused_as_by_torch(norm: str) -> None:
    for f, name in ((F, "auto"), *((LF, kernel) for kernel in KERNELS)):
        x, w = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
        base = x * 1
        with llmkern.backend(name):
            y = getattr(f, norm)(base, (6,), w)
        base.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_small_calls_and_what_kernels_lack_are_torchs() -> None:
    def chosen(norm: str, x: Tensor, w: Tensor) -> str:
        return llmkern.explain(getattr(LF, norm), x, x.shape[-1:], w).backends[0]

    large, small = torch.randn(1024, 1024), torch.randn(4, 8)
    expected = "native" if "native" in KERNELS else "torch"
    for norm in NORMS:
        assert chosen(norm, large, torch.ones(1024)) == expected
        assert chosen(norm, small, torch.ones(8)) == "torch"
    assert chosen("rms_norm", large, torch.ones(1024, dtype=torch.bfloat16)) == "torch"
    assert chosen("rms_norm", large.bfloat16(), torch.ones(1024)) == expected


def test_autocast_and_the_meta_device() -> None:
    layers = [f(1024, device=d) for d in ("cpu", "meta") for f in (lnn.LayerNorm, lnn.RMSNorm)]
    for layer in layers:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1024, 1024, dtype=dtype, device=layer.weight.device)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == dtype
            assert layer(x).device == x.device


# Constructor's arguments, beside normalized_shape.
OPTIONS: list[tuple[type, dict[str, Any]]] = [
    (lnn.LayerNorm, {}),
    (lnn.LayerNorm, {"bias": False, "eps": 0.1}),
    (lnn.LayerNorm, {"elementwise_affine": False, "dtype": torch.float64}),
    (lnn.RMSNorm, {}),
    (lnn.RMSNorm, {"eps": 0.5, "dtype": torch.bfloat16}),
    (lnn.RMSNorm, {"elementwise_affine": False}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [6, (3, 6), [2, 3, 6]], ids=str)
def test_modules_are_torchs(kind: Any, options: dict[str, Any], shape: Any) -> None:
    torchs = getattr(torch.nn, kind.__name__)
    ours, theirs = kind(shape, **options), torchs(shape, **options)
    assert isinstance(ours, torchs)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 2, 3, 6, dtype=options.get("dtype"))
    for module in (ours, copy.deepcopy(ours)):
        for name in ("auto", "reference", *KERNELS):
            with llmkern.backend(name):
                torch.testing.assert_close(module(x), theirs(x))
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))
    torch.testing.assert_close(torch.jit.trace(ours, (x,))(x), theirs(x))
    exported = torch.export.export(ours, (x,), strict=False)
    assert not [n for n in exported.graph.nodes if "llmkern" in str(n.target)]
    torch.testing.assert_close(exported.module()(x), theirs(x))
