"""Squared error: every backend against the fp64 reference and torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING, assert_accurate, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch

OP = "mse_loss"
KERNELS = kernels(OP)
needs_native = pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="needs the native library")
REDUCTIONS = ("none", "mean", "sum")
# A scalar, vector tails, the sums' chunks of 8192 and blocks of 4096 and their neighbours, several with a tail.
SHAPES = ((), (1,), (7,), (5, 13), (4095,), (4096,), (4097,), (8191,), (2, 4096), (8193,), (3, 11, 1009))


def run(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of every tensor that requires one."""
    tensors = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
    loss = function(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, wanted, cotangent.to(loss.dtype).expand_as(loss))


def compare(tensors: tuple[Tensor, ...], reduction: str) -> None:
    doubles = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
    ours, theirs = (partial(f, reduction=reduction) for f in (LF.mse_loss, F.mse_loss))
    cotangent = torch.randn(tensors[0].shape if reduction == "none" else (), device=tensors[0].device)
    cotangent = cotangent.to(tensors[0].dtype)
    expected = run(theirs, doubles, cotangent.double())
    for a, e, t in zip(run(ours, tensors, cotangent), expected, run(theirs, tensors, cotangent), strict=True):
        # The fp64 reference rounds its own sum: against it, fp64 may be off by the square root of the terms.
        assert_accurate(a, e, t, ulps=64 if a.dtype == torch.float64 else 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_gradients(backend: str, device: torch.device, dtype: torch.dtype, reduction: str) -> None:
    for shape in SHAPES:
        x, t = torch.randn(2, *shape, device=device).to(dtype).unbind()
        compare((x.requires_grad_(), t.requires_grad_()), reduction)
        compare((x.detach().requires_grad_(), t.detach()), reduction)
        compare((x.detach(), t.detach().requires_grad_()), reduction)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS or ["reference"])
@settings(max_examples=10 if INTERPRETING else 25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    order=st.randoms(use_true_random=False),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_shape_and_stride(kernel: str, shape: list[int], order: object, reduction: str) -> None:
    permutation = list(range(len(shape)))
    order.shuffle(permutation)  # type: ignore[attr-defined]
    x = torch.randn(shape, dtype=torch.double).permute(permutation).requires_grad_()
    t = torch.randn(x.shape, dtype=torch.double)
    with llmkern.backend(kernel):
        if x.numel():
            compare((x, t), reduction)
        torch.testing.assert_close(
            LF.mse_loss(x, t, reduction=reduction), F.mse_loss(x, t, reduction=reduction), equal_nan=True
        )


def test_empty(backend: str, device: torch.device) -> None:
    x = torch.empty(0, 3, device=device, requires_grad=True)
    assert LF.mse_loss(x, x.detach()).isnan()
    assert LF.mse_loss(x, x.detach(), reduction="sum") == 0
    assert LF.mse_loss(x, x.detach(), reduction="none").shape == (0, 3)
    LF.mse_loss(x, x.detach()).backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)


def test_views_and_expanded_tensors(backend: str, device: torch.device) -> None:
    base = torch.randn(6, 10, device=device)
    compare((base.t().requires_grad_(), torch.randn(10, 6, device=device)), "mean")
    compare((base[::2, 1:8:3].requires_grad_(), base[1:4, 7:]), "none")
    compare((base.requires_grad_(), torch.randn(1, 10, device=device).expand(6, 10)), "sum")


def test_nan_and_infinity_come_through(backend: str, device: torch.device) -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), float("inf")], device=device)
    t = torch.tensor([0.5, 1.0, 1.0, 1.0, float("inf")], device=device)
    for reduction in REDUCTIONS:
        compare((x.requires_grad_(), t), reduction)


def test_half_precision_mean_does_not_overflow() -> None:
    """torch squares in float16: one square past 65504 makes its mean infinite."""
    x, t = torch.zeros(2, 100, dtype=torch.float16).unbind()
    x[0] = 300
    assert F.mse_loss(x, t).isinf()
    for name in ("native", "triton", "reference"):
        if dispatch.unavailable(name) is None:
            with llmkern.backend(name):
                assert LF.mse_loss(x, t) == 900
                assert LF.mse_loss(x, t, reduction="sum").isinf()


@needs_native
@pytest.mark.parametrize("count", [1_000_003, 4_200_003], ids=["cached", "streamed"])
def test_same_bits_for_any_thread_count(count: int) -> None:
    """Gradients of the forward (cotangent 1) and of the backward."""
    threads = torch.get_num_threads()
    x, t = (torch.randn(count, requires_grad=True) for _ in range(2))
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with llmkern.backend("native"):
                results.append(
                    [*run(LF.mse_loss, (x, t), torch.ones(())), *run(LF.mse_loss, (x, t), torch.tensor(0.7))]
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sum_is_of_partial_sums_in_order(kernel: str) -> None:
    """The same bits in every run; one fp32 sum, at 4e7 after the first block, would take no notice of the ones."""
    x = torch.cat([torch.full((4096,), 100.0), torch.ones(50_000)])
    with llmkern.backend(kernel):
        first, again = (LF.mse_loss(x, torch.zeros_like(x), reduction="sum") for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first.double(), x.double().square().sum(), rtol=1e-6, atol=0)


def test_large_sum_is_accurate() -> None:
    """Sixteen million equal terms: a single fp32 accumulator would stop growing at 2^24."""
    x = torch.ones(1 << 24).add_(0).reshape(-1)
    x = torch.cat([x, torch.ones(999)])
    assert LF.mse_loss(x, torch.zeros_like(x)) == 1
    assert_accurate(LF.mse_loss(x, torch.zeros_like(x), reduction="sum"), torch.tensor(float(x.numel())).double())


def test_weight(backend: str, device: torch.device) -> None:
    x, t, w = torch.randn(3, 4, 5, device=device, dtype=torch.double).unbind()
    w = w.abs()
    if backend in ("native", "triton"):
        with pytest.raises(dispatch.BackendError, match="does not serve weight"):
            LF.mse_loss(x, t, weight=w)
        return
    for reduction in REDUCTIONS:
        cotangent = torch.randn((4, 5) if reduction == "none" else (), dtype=torch.double, device=device)
        arguments = tuple(a.requires_grad_() for a in (x, t, w))
        ours, theirs = (
            run(lambda x, t, w, f=f, r=reduction: f(x, t, reduction=r, weight=w), arguments, cotangent)
            for f in (LF.mse_loss, F.mse_loss)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    taller = torch.randn(2, 4, 5, dtype=torch.double, device=device)
    with pytest.warns(UserWarning, match="Using a target size"):
        torch.testing.assert_close(LF.mse_loss(x, taller, weight=w), F.mse_loss(x, taller, weight=w))
    half = [a.detach().half() for a in (x, t)]
    assert LF.mse_loss(*half, weight=w.float()).dtype == F.mse_loss(*half, weight=w.float()).dtype


def test_broadcasting_warns_as_torch_does(backend: str, device: torch.device) -> None:
    x, t = torch.randn(4, 3, device=device), torch.randn(3, device=device)
    with pytest.warns(UserWarning, match="Using a target size") as theirs:
        expected = F.mse_loss(x, t)
    with pytest.warns(UserWarning, match="Using a target size") as ours:
        torch.testing.assert_close(LF.mse_loss(x, t), expected)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    if backend != "torch":
        assert ours[0].filename == __file__
    mismatched = torch.randn(4, device=device)
    with pytest.warns(UserWarning, match="Using"), pytest.raises(RuntimeError, match="must match the size"):
        LF.mse_loss(x, mismatched)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reduction": "average"},
        {"weight": torch.ones(2)},
        {"weight": torch.ones(2), "reduction": "average"},
        {"input": torch.ones(3, dtype=torch.int64), "target": torch.ones(3, dtype=torch.int64)},
        {"target": torch.ones(3, device="meta")},
    ],
    ids=repr,
)
def test_errors_are_torchs(arguments: dict[str, object]) -> None:
    call = {"input": torch.randn(3), "target": torch.randn(3), **arguments}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.mse_loss(**call)
    with pytest.raises(theirs.type) as ours:
        LF.mse_loss(**call)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(backend: str, device: torch.device, size_average: bool | None, reduce: bool | None) -> None:
    x, t = torch.randn(2, 3, 4, device=device).unbind()
    torch.testing.assert_close(LF.mse_loss(x, t, size_average, reduce), F.mse_loss(x, t, size_average, reduce))


@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes_promote(pair: tuple[torch.dtype, torch.dtype]) -> None:
    x, t = torch.randn(3, 4).to(pair[0]).requires_grad_(), torch.randn(3, 4).to(pair[1])
    try:
        theirs = run(F.mse_loss, (x, t), torch.tensor(0.3))
    except RuntimeError as error:
        # torch 2.10 has no gradients of two dtypes.
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            run(LF.mse_loss, (x, t), torch.tensor(0.3))
        return
    for name in ("auto", "torch", "reference"):
        with llmkern.backend(name):
            ours = run(LF.mse_loss, (x, t), torch.tensor(0.3))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast(backend: str, device: torch.device) -> None:
    x = torch.randn(8, 9, device=device, dtype=torch.bfloat16, requires_grad=True)
    t = torch.randn(8, 9, device=device)
    for target in (t, t.bfloat16()):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            ours = run(LF.mse_loss, (x, target), torch.tensor(0.3))
            theirs = run(F.mse_loss, (x, target), torch.tensor(0.3))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(backend: str, device: torch.device, reduction: str) -> None:
    x, t = (torch.randn(3, 5, dtype=torch.double, device=device, requires_grad=True) for _ in range(2))
    loss = partial(LF.mse_loss, reduction=reduction)
    for arguments in ((x, t), (x, t.detach()), (x.detach(), t)):
        assert gradcheck(loss, arguments, check_forward_ad=True, check_batched_grad=True, fast_mode=INTERPRETING)
        assert gradgradcheck(loss, arguments, check_fwd_over_rev=backend != "torch", fast_mode=INTERPRETING)
    third = torch.autograd.functional.hessian(lambda x: loss(x, t.detach()).pow(2).sum(), x.detach())
    expected = torch.autograd.functional.hessian(
        lambda x: F.mse_loss(x, t.detach(), reduction=reduction).pow(2).sum(), x.detach()
    )
    torch.testing.assert_close(third, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_function_transforms(backend: str, device: torch.device, reduction: str) -> None:
    x, t, v = torch.randn(3, 3, 5, device=device).unbind()
    ours, theirs = (partial(f, reduction=reduction) for f in (LF.mse_loss, F.mse_loss))
    for transform in (
        lambda f: torch.func.vmap(f)(x, t),
        lambda f: torch.func.vmap(f, in_dims=(1, 1))(x, t),
        lambda f: torch.func.vmap(f, in_dims=(1, None))(x, t[:, 0]),
        lambda f: torch.func.vmap(torch.func.grad(lambda a, b: f(a, b).sum()), in_dims=(1, 1))(x, t),
        lambda f: torch.func.grad(lambda a, b: f(a, b).sin().sum(), argnums=(0, 1))(x, t),
        lambda f: torch.func.jvp(f, (x, t), (v, t)),
        lambda f: torch.func.hessian(lambda a: f(a, t[0]).sin().sum())(x[0]),
        lambda f: torch.func.jacrev(f)(x, t),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_in_one_graph(backend: str, device: torch.device, reduction: str) -> None:
    loss = partial(LF.mse_loss, reduction=reduction)
    x, t = torch.randn(6, 7, device=device, requires_grad=True), torch.randn(7, 6, device=device).t()
    torch.compiler.reset()
    compiled = torch.compile(lambda x, t: loss(x, t), fullgraph=True, backend="aot_eager")
    cotangent = torch.randn((6, 7) if reduction == "none" else (), device=device)
    for a, b in zip(run(compiled, (x, t), cotangent), run(loss, (x, t), cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_backward_follows_the_forward() -> None:
    x = torch.randn(4, requires_grad=True)
    with llmkern.backend("reference"):
        loss = LF.mse_loss(x, torch.zeros(4))
    assert "MseLossFunction" not in type(loss.grad_fn.next_functions[0][0]).__name__
    if dispatch.unavailable("native") is None:
        assert llmkern.explain(LF.mse_loss, x, torch.zeros(4)).backends == ("native",)
        assert llmkern.explain(lambda: LF.mse_loss(x, x, weight=torch.ones(4))).backends == ("torch",)


def test_module_is_torchs() -> None:
    for arguments in ({}, {"reduction": "sum"}, {"reduction": "none"}):
        ours, theirs = lnn.MSELoss(**arguments), torch.nn.MSELoss(**arguments)
        assert repr(ours) == repr(theirs)
        assert ours.state_dict() == theirs.state_dict()
        x, t = torch.randn(2, 3, 4).unbind()
        torch.testing.assert_close(copy.deepcopy(ours)(x, t), theirs(x, t))


def test_torchs_own_samples(backend: str) -> None:
    info = next(m for m in module_db if m.module_cls is torch.nn.MSELoss)
    for sample in info.module_inputs_func(info, "cpu", torch.float32, True, training=True):
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        inputs = sample.forward_input.args
        torch.testing.assert_close(
            lnn.MSELoss(*arguments, **keywords)(*inputs), torch.nn.MSELoss(*arguments, **keywords)(*inputs)
        )
    info = next(o for o in op_db if o.name == "nn.functional.mse_loss")
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        if backend in ("native", "triton") and sample.kwargs.get("weight") is not None:
            continue
        torch.testing.assert_close(
            LF.mse_loss(sample.input, *sample.args, **sample.kwargs),
            F.mse_loss(sample.input, *sample.args, **sample.kwargs),
        )
