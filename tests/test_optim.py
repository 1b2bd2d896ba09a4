"""Optimizers: every backend against torch's in fp64, and what surrounds a step: states, groups, fallbacks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from checks import FLOATS, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern import dispatch, optim, reference
from llmkern.dispatch import BackendError

OP = "adam"
NAMES = ("Adam", "AdamW")
NATIVE = dispatch.unavailable("native") is None
# A scalar, nothing at all, tails of a vector, a chunk of 32768 and its neighbours.
SHAPES = ((), (0,), (1,), (7,), (5, 13), (32768,), (32769,), (3, 11, 1009))


def parameters(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def train(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    steps: int,
    first: int = 0,
    rounded_to: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Steps on gradients that depend on the step alone; the parameters, then their states."""
    for i in range(first, first + steps):
        g = torch.Generator().manual_seed(100 + i)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(rounded_to).to(p.dtype)
        optimizer.step()
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in (*params, *states)]


def compare(name: str, dtype: torch.dtype, **options: Any) -> None:
    def run(module: Any, wide: torch.dtype) -> list[Tensor]:
        params = [p.detach().to(wide).requires_grad_() for p in parameters(dtype)]
        return train(getattr(module, name)(params, **options), params, 4, rounded_to=dtype)

    ours, right, own = run(optim, dtype), run(torch.optim, torch.float64), run(torch.optim, dtype)
    for got, want, theirs in zip(ours, right, own, strict=True):
        assert_accurate(got, want.double(), theirs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_option(backend: str, name: str, dtype: torch.dtype) -> None:
    for options in (
        {},
        {"lr": 0.1, "betas": (0.8, 0.7), "eps": 1e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "amsgrad": True},
        {"maximize": True, "weight_decay": 0.03, "lr": 0.02},
        {"amsgrad": True, "maximize": True},
        # torch.lerp takes its other branch from a weight of 0.5 on.
        {"betas": (0.3, 0.99)},
        {"betas": (0.0, 0.0)},
        {"lr": 0.0, "weight_decay": 1.0},
    ):
        # In float16 the default of 1e-8 is 0, and torch's own step 0 / 0 where the square of a gradient vanishes.
        compare(name, dtype, **({"eps": 1e-3} if dtype == torch.float16 else {}) | options)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5).map(tuple),
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    decay=st.floats(0, 1),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_numbers(shapes: Any, lr: float, betas: Any, decay: float, flags: Any) -> None:
    """Against torch in fp64, where both orders of operation agree to rounding."""
    decoupled, amsgrad, maximize = flags
    name = "AdamW" if decoupled else "Adam"
    options = {"lr": lr, "betas": betas, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    ours, theirs = parameters(torch.float64, shapes), parameters(torch.float64, shapes)
    with llmkern.backend("native" if NATIVE else "reference"):
        got = train(getattr(optim, name)(ours, **options), ours, 3)
    want = train(getattr(torch.optim, name)(theirs, **options), theirs, 3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = parameters(dtype)
            with llmkern.backend("native"):
                return train(optim.AdamW(params, lr=0.1), params, 2)
        finally:
            torch.set_num_threads(before)

    for one, many in zip(run(1), run(3), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_state_dict_goes_both_ways(backend: str, name: str, amsgrad: bool) -> None:
    """Steps by turns in torch and here, through the state_dict, end where torch alone ends."""
    options = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": amsgrad}
    params, alone = parameters(torch.float64), parameters(torch.float64)
    want = train(getattr(torch.optim, name)(alone, **options), alone, 9)
    state: dict[str, Any] | None = None
    for i, module in enumerate((torch.optim, optim, torch.optim)):
        optimizer = getattr(module, name)(params, lr=1.0)
        if state is not None:
            optimizer.load_state_dict(state)
        else:
            optimizer = getattr(module, name)(params, **options)
        got = train(optimizer, params, 3, first=3 * i)
        # What a checkpoint does.
        state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert state is not None
    theirs = getattr(torch.optim, name)(alone, **options).state_dict()["param_groups"]
    assert [set(group) for group in state["param_groups"]] == [set(group) for group in theirs]


def test_groups_schedulers_closures_and_hooks(backend: str) -> None:
    def run(module: Any) -> tuple[list[Tensor], list[float], int]:
        params = parameters(torch.float64)
        optimizer = module.AdamW(
            [{"params": params[:3], "lr": 0.5}, {"params": params[3:5], "weight_decay": 0.5}, {"params": params[5:]}],
            lr=0.01,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.5, 0.1, 0.05], total_steps=5)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        optimizer.register_step_pre_hook(count)
        optimizer.register_step_post_hook(count)
        losses = []
        for _ in range(4):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = sum((p * p).sum() for p in params)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            schedule.step()
        return [p.detach() for p in params], losses, calls

    (got, losses, calls), (want, their_losses, their_calls) = run(optim), run(torch.optim)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses, their_losses, rtol=1e-12, atol=0)
    assert calls == their_calls == 8
    assert losses[-1] < losses[0]


def test_a_parameter_without_gradient_stays(backend: str) -> None:
    moved, still = parameters(torch.float32, ((9,), (9,)))
    before = still.detach().clone()
    optimizer = optim.Adam([moved, still])
    moved.grad = torch.ones(9)
    optimizer.step()
    assert torch.equal(still, before)
    assert still not in optimizer.state
    assert optimizer.state[moved]["step"] == 1
    assert optim.Adam([still]).step() is None


def test_nan_and_infinity_come_through(backend: str) -> None:
    """As from torch: they poison their own element and no other."""
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0, 1e-30])

    def run(module: Any) -> Tensor:
        (p,) = parameters(torch.float32, ((6,),))
        p.grad = values.clone()
        module.Adam([p], lr=0.1).step()
        return p.detach()

    torch.testing.assert_close(run(optim), run(torch.optim), equal_nan=True)


def test_grad_scaler_skips_a_step_with_infinities(backend: str) -> None:
    (p,) = parameters(torch.float32, ((9,),))
    optimizer, scaler = optim.Adam([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    start = p.detach().clone()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, start)
    assert scaler.get_scale() == 4
    optimizer.zero_grad()
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    # The first step of Adam moves by lr whatever the gradient, if it was unscaled.
    torch.testing.assert_close(p.detach(), start - 0.1)


def test_a_graph_that_needs_the_old_values_notices(backend: str) -> None:
    (p,) = parameters(torch.float32, ((9,),))
    y = (p * p).sum()
    p.grad = torch.ones(9)
    optim.Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


FALLBACKS = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "differentiable": {"differentiable": True},
    "a tensor as learning rate or beta": {"lr": torch.tensor(0.1)},
}


@pytest.mark.parametrize("reason", [*FALLBACKS, "non-contiguous tensors", "complex tensors"])
def test_what_no_kernel_serves_is_torchs_own_step(reason: str) -> None:
    options = FALLBACKS.get(reason, {})

    def start() -> Tensor:
        if reason == "complex tensors":
            return torch.arange(12.0).to(torch.complex64).requires_grad_()
        base = torch.arange(12.0).reshape(3, 4)
        return (base.t() if reason == "non-contiguous tensors" else base).requires_grad_()

    def run(module: Any) -> tuple[Tensor, Any]:
        leaf = start()
        # A differentiable step writes to its parameters under autograd, which forbids that for leaves.
        p = leaf.clone() if reason == "differentiable" else leaf
        optimizer = module.Adam([p], **options)
        p.grad = torch.ones_like(p) * 0.5
        if reason == "capturable":
            with pytest.raises(AssertionError) as error:
                optimizer.step()
            return p.detach(), str(error.value)
        choice = llmkern.explain(optimizer.step)
        if reason == "differentiable":
            p.sum().backward()
            return leaf.grad, choice
        return p.detach(), choice

    (got, said), (want, theirs) = run(optim), run(torch.optim)
    assert torch.equal(got, want)
    if reason == "capturable":
        assert said == theirs
    else:
        assert said.backends == ("torch",)
        if NATIVE:
            assert ("complex64" if reason == "complex tensors" else reason) in str(said)


def test_sparse_gradients_raise_torchs_error() -> None:
    def run(module: Any) -> str:
        (p,) = parameters(torch.float32, ((5, 3),))
        p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (5, 3), check_invariants=True)
        with pytest.raises(RuntimeError) as error:
            module.Adam([p]).step()
        return str(error.value)

    assert run(optim) == run(torch.optim)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_forced_backend_that_cannot_serve_raises(name: str) -> None:
    if dispatch.unavailable(name) is not None:
        pytest.skip(f"{name}: {dispatch.unavailable(name)}")
    (p,) = parameters(torch.float32, ((5, 3),))
    p.grad = torch.ones(5, 3)
    before = p.detach().clone()
    # The layout decides before the options do.
    with llmkern.backend(name), pytest.raises(BackendError, match="differentiable"):
        optim.Adam([p], differentiable=True).step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}],
)
@pytest.mark.parametrize("name", NAMES)
def test_constructors_raise_torchs_errors(name: str, options: dict[str, Any]) -> None:
    messages = []
    for module in (optim, torch.optim):
        with pytest.raises(ValueError, match="Invalid") as error:
            getattr(module, name)([torch.ones(1)], **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
def test_the_native_step_refuses_what_does_not_fit_together() -> None:
    from llmkern import native

    numbers = (0.1, 0.9, 0.99, 1e-8, 0.0, False, False)

    def call(params: Any, grads: Any, avgs: Any, squares: Any, maxima: Any = (), steps: Any = (1.0,)) -> None:
        native.adam_step(list(params), list(grads), list(avgs), list(squares), list(maxima), list(steps), *numbers)

    p, short, wide = torch.zeros(40), torch.zeros(39), torch.zeros(40, dtype=torch.float64)
    for bad in (short, wide, torch.zeros(80)[::2], torch.zeros(40, dtype=torch.complex64)):
        for place in range(1, 4):
            tensors = [p, torch.ones(40), torch.zeros(40), torch.zeros(40)]
            tensors[place] = bad
            with pytest.raises(ValueError, match="expected"):
                call(*([t] for t in tensors))
        with pytest.raises(ValueError, match="expected"):
            call([p], [torch.ones(40)], [torch.zeros(40)], [torch.zeros(40)], [bad])
    with pytest.raises(ValueError, match="as many"):
        call([p], [torch.ones(40)], [torch.zeros(40)], [])
    with pytest.raises(ValueError, match="as many"):
        call([p], [torch.ones(40)], [torch.zeros(40)], [torch.zeros(40)], steps=())
    assert not p.any()


def test_the_reference_is_the_formula() -> None:
    """One element by hand: two steps of AdamW with amsgrad."""
    p, lr, b1, b2, eps, wd = 2.0, 0.1, 0.9, 0.99, 1e-8, 0.01
    m = v = top = 0.0
    x, avg, square, largest = (torch.tensor([value], dtype=torch.float64) for value in (p, 0, 0, 0))
    for t, g in ((1, 3.0), (2, -0.5)):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        top = max(top, v)
        p = p * (1 - lr * wd) - lr * (m / (1 - b1**t)) / ((top / (1 - b2**t)) ** 0.5 + eps)
        grad = torch.tensor([g], dtype=torch.float64)
        reference.adam_step([x], [grad], [avg], [square], [largest], [float(t)], lr, b1, b2, eps, wd, True, False)
        assert x.item() == pytest.approx(p, rel=1e-14)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_the_other_optimizers_are_torchs(name: str) -> None:
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9, "nesterov": True} if name == "SGD" else {})}
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = getattr(optim, name)(ours, **options)
    got = train(optimizer, ours, 3)
    want = train(getattr(torch.optim, name)(theirs, **options), theirs, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert llmkern.explain(optimizer.step).backends == ("torch",)


def test_the_namespace_is_torchs() -> None:
    assert set(dir(optim)) >= set(dir(torch.optim)) - {"adam", "adamw", "sgd", "adagrad"}
    assert optim.LBFGS is torch.optim.LBFGS
    from llmkern.optim.lr_scheduler import LambdaLR

    assert LambdaLR is torch.optim.lr_scheduler.LambdaLR
    for name in ("Adam", "AdamW", "SGD", "Adagrad"):
        (p,) = parameters(torch.float32, ((3,),))
        ours, theirs = getattr(optim, name)([p], lr=0.1), getattr(torch.optim, name)([p], lr=0.1)
        assert isinstance(ours, getattr(torch.optim, name))
        assert repr(ours) == repr(theirs)
        assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
        assert type(copy.deepcopy(ours)) is type(pickle.loads(pickle.dumps(ours))) is type(ours)
