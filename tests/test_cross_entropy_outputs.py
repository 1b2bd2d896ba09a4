"""Cross-entropy beyond the loss: outputs beside it, gradients of probabilities, the logits' place, layouts, sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

OP = "cross_entropy"
KERNELS = kernels(OP)
needs_native = pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="needs the native library")
EVERYTHING = ("lse", "entropy", "argmax", "accuracy")
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": -0.7}


def by_hand(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    z_loss: float = 0,
    softcap: float = 0,
    logit_scale: float = 1,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse and entropy of every row, from torch's own functions."""
    z = logits * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse = z.logsumexp(1)
    entropy = torch.special.entr(z.softmax(1)).sum(1)
    loss = TF.cross_entropy(z, target, weight, reduction="none", **options) + z_loss * lse.square()
    if not target.is_floating_point():
        loss, lse, entropy = (row.masked_fill(target == -100, 0) for row in (loss, lse, entropy))
    return loss, lse, entropy


def ours(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = F.cross_entropy(logits, target, weight, reduction="none", outputs=("lse", "entropy"), **options)
    assert output.argmax is None
    return output.loss, output.lse, output.entropy


def derivatives(function: Callable[..., Any], leaves: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    """The outputs, and the gradients of the leaves for cotangents that are the same for each call."""
    leaves = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    outputs = function(*leaves, *args, **options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g).to(t) for t in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


def case(shape: tuple[int, ...], dtype: torch.dtype, soft: bool, ignored: bool = True) -> tuple[Tensor, Tensor]:
    logits = (2 * torch.randn(shape)).to(dtype)
    if soft:
        return logits, torch.randn(shape).softmax(1).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    if ignored and shape[0] > 1:
        target[shape[0] // 2] = -100
    return logits, target


# 35: a tail in every instruction set; 2500: two slabs of a row; (3, 35, 21): classes apart, a tail in groups of 16.
@pytest.mark.parametrize("shape", [(5, 35), (2, 2500), (3, 35, 21)], ids=str)
@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_output_and_its_gradient(
    kernel: str,
    dtype: torch.dtype,
    options: dict[str, float],
    weighted: bool,
    soft: bool,
    shape: tuple[int, ...],
) -> None:
    logits, target = case(shape, dtype, soft)
    weight = (0.5 + torch.rand(shape[1])).to(dtype) if weighted else None
    leaves = [logits, target]
    wide = [t.double() if t.is_floating_point() else t for t in leaves]
    expected = derivatives(by_hand, wide, None if weight is None else weight.double(), **options)
    with llmkern.backend(kernel):
        got = derivatives(ours, leaves, weight, **options)
    with llmkern.backend("reference"):
        reference = derivatives(ours, leaves, weight, **options)
    for a, e, r in zip(got, expected, reference, strict=True):
        assert_accurate(a, e, r)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives(backend: str, reduction: str, options: dict[str, float], soft: bool) -> None:
    if backend == "torch":
        pytest.skip("torch has no outputs")
    logits, target = case((3, 4), torch.float64, soft)
    leaves = (logits.requires_grad_(), target.requires_grad_()) if soft else (logits.requires_grad_(),)

    def function(logits: Tensor, target: Tensor = target) -> tuple[Tensor, ...]:
        output = F.cross_entropy(logits, target, reduction=reduction, outputs=("entropy", "lse"), **options)
        return output.loss, output.lse, output.entropy

    everything = not INTERPRETING
    assert gradcheck(
        function, leaves, check_forward_ad=everything, check_batched_grad=everything, fast_mode=INTERPRETING
    )
    # The second derivatives are the reference's.
    assert INTERPRETING or gradgradcheck(function, leaves)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_outputs_under_transforms_and_the_compiler() -> None:
    logits, target = case((4, 6), torch.float64, False)

    def function(logits: Tensor) -> Tensor:
        output = F.cross_entropy(logits, target, outputs=EVERYTHING, z_loss=0.1)
        return output.loss + (output.entropy * output.lse).sum()

    def definition(logits: Tensor) -> Tensor:
        loss, lse, entropy = by_hand(logits, target, z_loss=0.1)
        return loss.sum() / (target != -100).sum() + (entropy * lse).sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.vmap(torch.func.grad(f))):
        x = torch.stack([logits, -logits]) if transform not in (torch.func.grad, torch.func.hessian) else logits
        torch.testing.assert_close(transform(function)(x), transform(definition)(x))
    x = logits.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, definition(x))
    (got,), (want,) = (torch.autograd.grad(f, x) for f in (compiled, definition(x)))
    torch.testing.assert_close(got, want)


def test_argmax_and_accuracy(backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch has no outputs")
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[1.0, 3, 2], [2, 5, 5], [0, nan, 9], [-inf, -inf, -inf], [-inf, inf, 0], [7, 8, 9]])
    target = torch.tensor([1, 2, 1, 0, 0, -100])
    best = [1, 1, 1, 0, 1, -1]  # the first of equals, and of NaN
    output = F.cross_entropy(rows, target, outputs=EVERYTHING)
    assert output.argmax.tolist() == best
    assert output.accuracy.item() == pytest.approx(3 / 5)
    assert torch.equal(F.cross_entropy(rows.flip(0), target.flip(0), outputs=("argmax",)).argmax, output.argmax.flip(0))
    torch.testing.assert_close(output.lse[:5], rows[:5].logsumexp(1), equal_nan=True)
    soft = TF.one_hot(target.clamp(min=0), 3).float()
    assert F.cross_entropy(rows[:5], soft[:5], outputs=("accuracy",)).accuracy.item() == pytest.approx(3 / 5)
    nothing = F.cross_entropy(rows, torch.full((6,), -100), outputs=("accuracy", "lse"))
    assert nothing.accuracy.isnan()
    assert torch.equal(nothing.lse, torch.zeros(6))
    # Far into a row, past the first slab, and with every tail.
    long = torch.zeros(40, 6000)
    places = torch.randint(6000, (40,))
    long[torch.arange(40), places] = 1
    assert torch.equal(F.cross_entropy(long, places, outputs=("argmax",)).argmax, places)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 6, 3, 5)])
def test_outputs_have_the_shape_of_the_losses(backend: str, shape: tuple[int, ...]) -> None:
    if backend == "torch":
        pytest.skip("torch has no outputs")
    logits = torch.randn(shape)
    dim = 0 if len(shape) == 1 else 1
    target = torch.randint(6, shape[:dim] + shape[dim + 1 :])
    output = nn.CrossEntropyLoss(outputs=EVERYTHING)(logits, target)
    torch.testing.assert_close(output.lse, logits.logsumexp(dim))
    torch.testing.assert_close(output.entropy, torch.special.entr(logits.softmax(dim)).sum(dim))
    assert torch.equal(output.argmax, logits.argmax(dim))
    torch.testing.assert_close(output.accuracy, (logits.argmax(dim) == target).float().mean())


def test_unknown_outputs() -> None:
    logits, target = case((3, 4), torch.float32, False)
    for wrong in (("perplexity",), "lse"):
        with pytest.raises(
            ValueError, match=r"outputs: got .* expected a sequence of names among lse, entropy, argmax"
        ):
            F.cross_entropy(logits, target, outputs=wrong)


# --- probabilities ---


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_probabilities_promote(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    logits, target = (t.to(d) for t, d in zip(case((5, 9), torch.float32, True), dtypes, strict=True))

    def function(library: Any) -> Callable[..., Any]:
        return lambda x, t: (library.cross_entropy(x, t, label_smoothing=0.1),)

    got, own = (derivatives(function(library), [logits, target]) for library in (F, TF))
    for a, t, e in zip(got, own, derivatives(function(TF), [logits.double(), target.double()]), strict=True):
        assert_accurate(a, e, t)


# --- what is written, and when ---


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_scaled_losses_use_the_gradient_of_the_forward(kernel: str) -> None:
    """A loss scaled by a number, as for mixed precision or accumulation, costs no second pass."""
    logits, target = case((9, 33), torch.float32, False)
    x = logits.requires_grad_()
    calls = []
    namespace = dispatch.load(kernel)
    backward = namespace.cross_entropy_backward
    with pytest.MonkeyPatch.context() as patch, llmkern.backend(kernel):
        patch.setattr(namespace, "cross_entropy_backward", lambda *args: (calls.append(1), backward(*args))[1])
        for factor in (1.0, 1024.0, 0.25):
            (got,) = torch.autograd.grad(F.cross_entropy(x, target) * factor, x)
            torch.testing.assert_close(got, torch.autograd.grad(TF.cross_entropy(x, target) * factor, x)[0])
        assert not calls
        loss = F.cross_entropy(x, target)
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, x, retain_graph=True)
        assert not calls
        torch.autograd.grad(loss, x, create_graph=True)
        assert len(calls) == 1


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inplace(kernel: str, dtype: torch.dtype) -> None:
    with llmkern.backend(kernel):
        _inplace(dtype)


def _inplace(dtype: torch.dtype) -> None:
    logits, target = case((9, 2500), dtype, False)
    leaf = logits.clone().requires_grad_()
    want = F.cross_entropy(leaf, target, label_smoothing=0.1)
    (dwant,) = torch.autograd.grad(want, leaf)
    produced = leaf * 1
    version = produced._version
    loss = F.cross_entropy(produced, target, label_smoothing=0.1, inplace=True)
    assert produced._version > version
    assert torch.equal(loss, want)
    (got,) = torch.autograd.grad(loss, produced, retain_graph=True)
    assert got.data_ptr() == produced.data_ptr()
    assert torch.equal(got, dwant)
    with pytest.raises(RuntimeError, match="inplace=True, which allows one backward"):
        torch.autograd.grad(loss, produced)
    produced = leaf * 1
    target[2] = 2500
    with pytest.raises(IndexError, match="Target 2500 is out of bounds"):
        F.cross_entropy(produced, target, inplace=True)
    assert torch.equal(produced, logits)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_inplace_tells_whoever_saved_the_logits(kernel: str) -> None:
    logits, target = case((3, 5), torch.float32, False)
    leaf = logits.requires_grad_()
    produced = leaf * 1
    other = produced.square().sum()
    with llmkern.backend(kernel):
        loss = F.cross_entropy(produced, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_inplace_overwrites_nothing_that_it_need_not(backend: str) -> None:
    logits, target = case((3, 5), torch.float32, False)
    for changed in (
        lambda x: F.cross_entropy(x.detach(), target, inplace=True),
        lambda x: F.cross_entropy(x * 1, target, inplace=True, reduction="none"),
        lambda x: F.cross_entropy(x.t().contiguous().t(), target, inplace=True),
    ):
        leaf = logits.clone().requires_grad_()
        loss = changed(leaf)
        assert torch.equal(leaf.detach(), logits)
        torch.testing.assert_close(loss, changed(leaf.clone()))


# --- layouts and sizes ---


class _Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts tensors of the logits' size that anything but the kernel makes."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        viewing = any(word in str(function) for word in ("view", "permute", "llmkern", "detach", "alias", "transpose"))
        if isinstance(result, Tensor) and result.numel() >= self.numel and not viewing:
            self.names.append(str(function))
        return result


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_images_are_not_copied(kernel: str, soft: bool, layout: torch.memory_format) -> None:
    logits, target = case((2, 19, 7, 5), torch.float32, soft, ignored=False)
    x = logits.contiguous(memory_format=layout).requires_grad_()
    t = target.contiguous(memory_format=layout) if soft else target
    with _Copies(x.numel()) as copies, llmkern.backend(kernel):
        loss = F.cross_entropy(x, t)
        loss.backward()
    assert copies.names == []
    assert x.grad.is_contiguous(memory_format=layout)
    other = logits.detach().clone().requires_grad_()
    TF.cross_entropy(other, target).backward()
    torch.testing.assert_close(x.grad, other.grad)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("shape", [(1, 300_000), (2, 128_256), (7, 4099), (2, 500, 40)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...], soft: bool) -> None:
    """Also with fewer rows than threads, which then share a row."""
    leaves = list(case(shape, torch.float32, soft))
    results = []
    for n in (1, 2, 5):
        with threads(n):
            results.append(derivatives(ours, leaves, **ALL_OPTIONS))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for a, e in zip(results[0], derivatives(by_hand, [t.double() if t.is_floating_point() else t for t in leaves],
                                            **ALL_OPTIONS), strict=True):  # fmt: skip
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_from_the_forward_and_the_backward(kernel: str) -> None:
    """The gradient that the forward makes is the one that a backward computes anew."""
    logits, target = case((5, 2500), torch.bfloat16, False)
    x = logits.requires_grad_()
    with llmkern.backend(kernel):
        loss = F.cross_entropy(x, target, reduction="sum", **ALL_OPTIONS)
    first, copied = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    (computed,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(first, copied)
    assert torch.equal(first, computed)


@needs_native
def test_more_than_two_to_the_31_logits() -> None:
    """Zeros, which take no memory as long as nobody writes to them, but for the pages of two rows."""
    N, V = 65_600, 32_771
    libc = ctypes.CDLL(None)
    libc.calloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    block = libc.calloc(ctypes.c_size_t(N * V), ctypes.c_size_t(2))
    try:
        logits = torch.frombuffer((ctypes.c_char * (2 * N * V)).from_address(block), dtype=torch.bfloat16).view(N, V)
        logits[-1, -1] = logits[0, 0] = 30
        target = torch.zeros(N, dtype=torch.int64)
        output = F.cross_entropy(logits, target, outputs=("argmax",), reduction="none")
        assert output.argmax[-1] == V - 1
        assert output.argmax[1:-1].sum() == 0
        torch.testing.assert_close(
            output.loss[1:-1].double(), torch.full((N - 2,), float(V)).double().log(), rtol=1e-2, atol=0
        )
        torch.testing.assert_close(output.loss[[0, -1]], torch.tensor([0.0, 30.0]).bfloat16())
    finally:
        libc.free(block)
