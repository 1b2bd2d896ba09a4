"""Linear + cross-entropy: against the composition in fp64, and against torch's own function if it has one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import llmkern
import llmkern.functional as LF
from llmkern import dispatch, reference

TORCH_HAS_IT = hasattr(F, "linear_cross_entropy")
needs_torch = pytest.mark.skipif(not TORCH_HAS_IT, reason="this torch has no linear_cross_entropy")
OP = "linear_cross_entropy"


def composition(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: None = None,
    **keywords: Any,
) -> Tensor:
    """The definition: torch's linear, torch's cross_entropy."""
    classes, *inner, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.reshape(-1, features), bias)
    logits = logits.reshape(*input.shape[:-1], classes, *inner)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **keywords)


def problem(
    batch: tuple[int, ...] = (6,),
    features: int = 5,
    classes: int = 7,
    inner: tuple[int, ...] = (),
    bias: bool = False,
    probabilities: bool = False,
    dtype: torch.dtype = torch.double,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """input, linear_weight, target, linear_bias; the floating ones but the target require a gradient."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    if probabilities:
        target = torch.rand(*batch, classes, *inner, device=device).softmax(len(batch)).to(dtype)
    else:
        target = torch.randint(classes, (*batch, *inner), device=device)
    return (
        leaf(*batch, features),
        leaf(classes, *inner, features),
        target,
        leaf(classes, *inner) if bias else None,
    )


def run(function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...], **keywords: Any) -> list[Tensor]:
    """The loss and every gradient, for a cotangent that is the same in each call of one shape."""
    arguments = tuple(a if a is None else a.detach().requires_grad_(a.requires_grad) for a in arguments)
    x, w, t, b = arguments
    loss = function(x, w, t, linear_bias=b, **keywords)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(loss.shape, generator=generator).to(loss)
    wanted = [a for a in arguments if a is not None and a.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, cotangent)]


def doubled(arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        a if a is None or not a.is_floating_point() else a.detach().double().requires_grad_(a.requires_grad)
        for a in arguments
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "indices": ({}, {}),
    "bias": ({"bias": True}, {"reduction": "sum"}),
    "unbatched": ({"batch": ()}, {}),
    "unbatched probabilities": ({"batch": (), "probabilities": True}, {"reduction": "none"}),
    "probabilities": ({"probabilities": True, "bias": True}, {"label_smoothing": 0.2}),
    "K-dimensional": ({"inner": (2, 3), "bias": True}, {"reduction": "none", "ignore_index": 2}),
    "K-dimensional probabilities": ({"inner": (2,), "probabilities": True}, {}),
    "ignored": ({}, {"ignore_index": 3, "label_smoothing": 0.1}),
    "none": ({"classes": 1}, {"reduction": "none"}),
    "empty batch": ({"batch": (0,)}, {"reduction": "sum"}),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(backend: str, device: torch.device, case: str, dtype: torch.dtype) -> None:
    shapes, keywords = CASES[case]
    arguments = problem(**shapes, dtype=dtype, device=device)
    theirs = F.linear_cross_entropy if TORCH_HAS_IT else composition
    for weight in (None, torch.rand(arguments[1].shape[0], device=device).to(dtype)):
        wide = None if weight is None else weight.double()
        expected = run(composition, doubled(arguments), weight=wide, **keywords)
        torchs = run(theirs, arguments, weight=weight, **keywords)
        ours = run(LF.linear_cross_entropy, arguments, weight=weight, **keywords)
        for a, e, t in zip(ours, expected, torchs, strict=True):
            assert_accurate(a, e, t, ulps=16)


def test_any_rank(backend: str, device: torch.device) -> None:
    for inner in ((), (2,)):
        for probabilities in (False, True):
            x, w, t, b = problem((2, 3, 4), inner=inner, bias=True, probabilities=probabilities, device=device)
            flat = (x.detach().flatten(0, 2).requires_grad_(), w, t.flatten(0, 2), b)
            for reduction in ("none", "mean", "sum"):
                ours = run(LF.linear_cross_entropy, (x, w, t, b), reduction=reduction)
                assert ours[0].shape == ((2, 3, 4, *inner) if reduction == "none" else ())
                for a, e in zip(ours, run(composition, flat, reduction=reduction), strict=True):
                    torch.testing.assert_close(a.reshape(e.shape), e)


def test_any_rank_checks_the_target(device: torch.device) -> None:
    x, w, t, _ = problem((2, 3), device=device)
    for bad in (t.t(), t.flatten(), t[..., None]):
        with pytest.raises(RuntimeError, match=r"expected target shape \(2, 3\) .* or \(2, 3, 7\)"):
            LF.linear_cross_entropy(x, w, bad)
    empty = LF.linear_cross_entropy(x[:0], w, t[:0], reduction="none")
    assert empty.shape == (0, 3)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    features=st.integers(1, 9),
    classes=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(batch: list[int], features: int, classes: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, w, t, b = problem(tuple(batch), features, classes, bias=bias)
    ours = LF.linear_cross_entropy(x, w, t, linear_bias=b, reduction="none")
    rows = x.shape[:-1].numel()
    expected = composition(x.reshape(rows, features), w, t.reshape(rows), linear_bias=b, reduction="none")
    torch.testing.assert_close(ours, expected.reshape(batch))


@needs_torch
@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.randn(())},
        {"linear_weight": torch.randn(5)},
        {"linear_weight": torch.randn(7, 4)},
        {"linear_bias": torch.randn(6)},
        {"input": torch.randn(5), "linear_weight": torch.randn(7, 2, 5)},
        {"target": torch.rand(6, 7), "ignore_index": 1},
        {"target": torch.full((6,), 7)},
        {"target": torch.zeros(5, dtype=torch.int64)},
        {"target": torch.zeros(6)},
        {"reduction": "average"},
        {"weight": torch.ones(6)},
        {"label_smoothing": 1.5},
    ],
    ids=repr,
)
def test_errors_are_torchs(change: dict[str, Any]) -> None:
    call = {
        "input": torch.randn(6, 5),
        "linear_weight": torch.randn(7, 5),
        "target": torch.zeros(6, dtype=torch.int64),
        **change,
    }
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.linear_cross_entropy(**call)
    with pytest.raises(theirs.type) as ours:
        LF.linear_cross_entropy(**call)
    assert str(ours.value) == str(theirs.value)


def test_derivatives(backend: str, device: torch.device) -> None:
    for case in ("bias", "probabilities", *["K-dimensional"] * (not INTERPRETING)):
        shapes, keywords = CASES[case]
        x, w, t, b = problem(**{"batch": (2,), "features": 2, "classes": 3, **shapes}, device=device)
        arguments = (x, w, b)

        def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor = t, keywords: dict[str, Any] = keywords) -> Tensor:
            return LF.linear_cross_entropy(x, w, t, linear_bias=b, **keywords)

        assert gradcheck(loss, arguments, check_forward_ad=not INTERPRETING)
        # The second derivatives are the reference's.
        assert INTERPRETING or gradgradcheck(loss, arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(backend: str, device: torch.device) -> None:
    x, w, t, _ = problem((3, 4), device=device)
    x, w = x.detach(), w.detach()
    for transform in (
        lambda f: torch.func.vmap(lambda x, t: f(x, w, t))(x, t),
        lambda f: torch.func.vmap(torch.func.grad(lambda x, t: f(x, w, t)))(x, t),
        lambda f: torch.func.grad(lambda x, w: f(x, w, t[0]), argnums=(0, 1))(x[0], w),
        lambda f: torch.func.jvp(lambda x: f(x, w, t[0]), (x[0],), (x[1],)),
        lambda f: torch.func.hessian(lambda x: f(x, w, t[0]))(x[0]),
    ):
        torch.testing.assert_close(transform(LF.linear_cross_entropy), transform(composition))


def test_compiles_in_one_graph(backend: str, device: torch.device) -> None:
    for batch in ((6,), (2, 3)):
        arguments = problem(batch, bias=True, device=device, dtype=torch.float32)
        torch.compiler.reset()
        compiled = torch.compile(LF.linear_cross_entropy, fullgraph=True, backend="aot_eager")
        for a, b in zip(run(compiled, arguments), run(LF.linear_cross_entropy, arguments), strict=True):
            torch.testing.assert_close(a, b)


def test_explain_and_forced_backends() -> None:
    x, w, t, _ = problem()
    fused = llmkern.explain(LF.linear_cross_entropy, x, w, t)
    if dispatch.unavailable("native") is None:
        assert [(c.op, c.backend) for c in fused.choices] == [(OP, "native")]
    with llmkern.backend("torch"):
        composed = llmkern.explain(LF.linear_cross_entropy, x, w, t)
    assert composed.choices[0].reason == "forced: linear, then cross_entropy"
    assert [c.op for c in composed.choices] == [OP, "linear", "cross_entropy"]
    with llmkern.backend("triton"), pytest.raises(dispatch.BackendError, match=rf"{OP}: backend 'triton' was"):
        LF.linear_cross_entropy(x, w, t)


@needs_torch
def test_chunking_is_torchs() -> None:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    x, w, t, _ = arguments = problem((7,), dtype=torch.float32)
    with llmkern.backend("torch"):
        explanation = llmkern.explain(LF.linear_cross_entropy, x, w, t, options=options)
        assert [c.op for c in explanation.choices] == [OP]
        assert explanation.choices[0].reason == "forced"
        for reduction in ("none", "mean", "sum"):
            ours = run(LF.linear_cross_entropy, arguments, options=options, reduction=reduction)
            theirs = run(F.linear_cross_entropy, arguments, options=options, reduction=reduction)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        deep = LF.linear_cross_entropy(x[None], w, t[None], options=options, reduction="none")
        torch.testing.assert_close(deep, composition(x, w, t, reduction="none")[None])
    with llmkern.backend("reference"):
        torch.testing.assert_close(LF.linear_cross_entropy(x, w, t, options=options), composition(x, w, t))


@needs_torch
def test_unserved_chunking_warns() -> None:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    x, w, t, _ = problem()
    with pytest.warns(UserWarning, match="``options`` ignored") as theirs:
        expected = F.linear_cross_entropy(x, w, t, options=options, label_smoothing=0.1)
    with llmkern.backend("torch"), pytest.warns(UserWarning, match="``options`` ignored") as ours:
        torch.testing.assert_close(LF.linear_cross_entropy(x, w, t, options=options, label_smoothing=0.1), expected)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]


def test_chunking_without_torchs_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["llmkern.functional.linear_cross_entropy"], "_TORCH_CHUNKS", False)
    x, w, t, _ = problem()
    with llmkern.backend("torch"), pytest.warns(UserWarning, match="``options`` ignored") as record:
        torch.testing.assert_close(LF.linear_cross_entropy(x, w, t, options=object()), composition(x, w, t))
    assert record[0].filename == __file__


@pytest.mark.parametrize("shapes", [{}, {"bias": True}, {"probabilities": True}], ids=repr)
def test_reference(shapes: dict[str, Any]) -> None:
    for dtype in (torch.double, torch.bfloat16):
        x, w, t, b = problem(**shapes, dtype=dtype)
        loss, lse, entropy, argmax = reference.linear_cross_entropy(x, w, b, t)
        wide = doubled((x, w, t, b))
        expected = composition(*wide[:3], linear_bias=wide[3], reduction="none")
        logits = F.linear(wide[0], wide[1], wide[3])
        assert_accurate(loss.to(dtype), expected)
        assert_accurate(lse.to(dtype), logits.logsumexp(1))
        assert_accurate(entropy.to(dtype), torch.distributions.Categorical(logits=logits).entropy())
        assert torch.equal(argmax, F.linear(x, w, b).argmax(1))


@pytest.mark.parametrize(
    "own",
    [{"z_loss": 0.1}, {"softcap": 2.0}, {"logit_scale": 0.5}, {"token_weight": torch.rand(2, 3)}],
    ids=repr,
)
def test_options_of_our_own(own: dict[str, Any]) -> None:
    x, w, t, _ = arguments = problem((2, 3), bias=True)
    ours = run(LF.linear_cross_entropy, arguments, **own)
    flat = {k: v.flatten() if isinstance(v, Tensor) else v for k, v in own.items()}

    def composed(x: Tensor, w: Tensor, t: Tensor, linear_bias: Tensor, **keywords: Any) -> Tensor:
        return LF.cross_entropy(F.linear(x, w, linear_bias).flatten(0, 1), t.flatten(), **keywords)

    for a, e in zip(ours, run(composed, arguments, **flat), strict=True):
        torch.testing.assert_close(a, e)
    assert not torch.allclose(ours[0], run(LF.linear_cross_entropy, arguments)[0])
    if TORCH_HAS_IT:
        with llmkern.backend("reference"), pytest.warns(UserWarning, match=f"does not know {next(iter(own))}"):
            LF.linear_cross_entropy(x, w, t, options=torch.nn.LinearCrossEntropyOptions(), **own)
