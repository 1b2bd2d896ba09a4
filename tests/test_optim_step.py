"""What surrounds a step: states, groups, schedulers, GradScaler, clipping, fallbacks, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from optimizers import OPTIONS, draw, parameters, train, values
from torch import Tensor

import llmkern
from llmkern import dispatch, optim
from llmkern.dispatch import BackendError

OP = "adam"
NATIVE = dispatch.unavailable("native") is None
NAMES = tuple(OPTIONS)
# An optimizer of each kind, with states.
TYPICAL: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_goes_both_ways(backend: str, name: str) -> None:
    """Steps by turns in torch and here, through the state_dict, end where torch alone ends."""
    options = TYPICAL[name]
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


@pytest.mark.parametrize("name", NAMES)
def test_wide_states_survive_their_state_dict(name: str) -> None:
    """Which torch's own loading would round; torch takes them, and rounds."""
    params = parameters(torch.bfloat16, ((7,), (3, 5)))
    make = lambda module, **more: getattr(module, name)(params, **TYPICAL[name], **more)  # noqa: E731
    ours = make(optim, state_dtype=torch.float32)
    train(ours, params, 3)
    saved = pickle.loads(pickle.dumps(ours.state_dict()))
    again, theirs = make(optim, state_dtype=torch.float32), make(torch.optim)
    again.load_state_dict(saved)
    theirs.load_state_dict(saved)
    for p in params:
        for key, value in ours.state[p].items():
            assert torch.equal(again.state[p][key], value), key
            if key != "step":
                assert value.dtype == torch.float32
                assert torch.equal(theirs.state[p][key], value.to(torch.bfloat16))
    # A state of torch's is widened at the next step.
    again.load_state_dict(theirs.state_dict())
    train(again, params, 1, first=3)
    assert all(v.dtype == torch.float32 for p in params for v in again.state[p].values())


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_keep_the_options(name: str) -> None:
    params = parameters(torch.bfloat16, ((7,), (3, 5)))
    optimizer = getattr(optim, name)(params, **TYPICAL[name], max_grad_norm=0.5, state_dtype=torch.float32)
    train(optimizer, params, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.max_grad_norm == 0.5
        theirs = [p for group in other.param_groups for p in group["params"]]
        assert values(other, theirs)[0].equal(params[0])
        twin = copy.deepcopy(optimizer)
        twins = [p for group in twin.param_groups for p in group["params"]]
        for got, want in zip(train(other, theirs, 2, first=2), train(twin, twins, 2, first=2), strict=True):
            assert torch.equal(got, want)
    assert "max_grad_norm" not in optimizer.state_dict()["param_groups"][0]


SCHEDULES = {
    "OneCycleLR": {"max_lr": [0.5, 0.1, 0.05], "total_steps": 6, "cycle_momentum": False},
    "CosineAnnealingLR": {"T_max": 3},
    "StepLR": {"step_size": 2, "gamma": 0.3},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_groups_schedulers_closures_and_hooks(backend: str, name: str, schedule: str) -> None:
    def run(module: Any) -> tuple[list[Tensor], list[float], int]:
        params = parameters(torch.float64, ((), (0,), (7,), (5, 13), (33,)))
        options = {key: value for key, value in TYPICAL[name].items() if key != "lr"}
        groups = [{"params": params[:3], "lr": 0.05}, {"params": params[3:4], "weight_decay": 0.5}]
        optimizer = getattr(module, name)(groups, lr=0.01, **options)
        optimizer.add_param_group({"params": params[4:], "maximize": False})
        scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **SCHEDULES[schedule])
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
            scheduler.step()
        return [p.detach() for p in params], losses, calls

    if name == "Adagrad" and torch.__version__ < "2.11":
        # torch's own has no states for groups that are added, and says so; nor has ours.
        for module in (optim, torch.optim):
            with pytest.raises(KeyError, match="sum"):
                run(module)
        return
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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(backend: str, name: str, fused: bool) -> None:
    """As torch's optimizer with the same scaler: infinities skip the step, gradients end unscaled, and `fused` folds
    the unscaling into the step."""

    def run(module: Any) -> tuple[list[Tensor], float]:
        params = parameters(torch.float32, ((9,), (33, 5)))
        optimizer = getattr(module, name)(params, **TYPICAL[name], fused=fused)
        # No power of two, so that unscaling rounds.
        scaler = torch.amp.GradScaler("cpu", init_scale=10.0, growth_interval=2)
        for factor in (1.0, float("inf"), 2.0, float("nan"), -1.0):
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() for p in params) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        return [*values(optimizer, params), *(p.grad for p in params)], scaler.get_scale()

    (got, scale), (want, their_scale) = run(optim), run(torch.optim)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, equal_nan=True)
    assert scale == their_scale


def test_infinities_before_the_first_step_leave_no_state(backend: str) -> None:
    (p,) = parameters(torch.float32, ((9,),))
    start = p.detach().clone()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    p.grad = torch.full((9,), float("inf"))
    if backend != "torch":
        optimizer.step(zero_grad=True)
        assert not p.grad.any()
        assert "momentum_buffer" not in optimizer.state[p]
    optimizer.found_inf = torch.tensor(0.0)
    p.grad = torch.ones(9)
    optimizer.step()
    torch.testing.assert_close(p.detach(), start - 0.1 * 0.25)


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_inside_the_step(backend: str, name: str, max_norm: float, scale: float | None) -> None:
    """Against torch's clip_grad_norm_ before torch's step, over two groups."""
    if backend == "torch" and scale is not None:
        pytest.skip("torch's single-tensor step takes no grad_scale")

    def start(module: Any, **more: Any) -> tuple[list[Tensor], Any]:
        params = parameters(torch.float64, ((7,), (5, 13), (33,)))
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        return params, getattr(module, name)(groups, **TYPICAL[name], **more)

    (ours, optimizer), (theirs, right) = start(optim, max_grad_norm=max_norm), start(torch.optim)
    for step in range(3):
        draw(ours, step, scale=scale or 1.0)
        draw(theirs, step)
        before = [p.grad.clone() for p in ours]
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        right.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        for p, was, clipped in zip(ours, before, theirs, strict=True):
            torch.testing.assert_close(p.grad, was if scale is None else clipped.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(values(optimizer, ours), values(right, theirs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_zeroing_gradients_inside_the_step(backend: str, name: str) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = getattr(optim, name)(ours, **TYPICAL[name])
    twin = getattr(optim, name)(theirs, **TYPICAL[name])
    draw(ours, 0)
    draw(theirs, 0)
    kept = [p.grad for p in ours]
    optimizer.step(zero_grad=True)
    twin.step()
    for got, want in zip(values(optimizer, ours), values(twin, theirs), strict=True):
        assert torch.equal(got, want)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(ours, kept, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_in_two_optimizers(backend: str, name: str) -> None:
    """Each has states of its own and steps on what it finds, as in torch."""

    def run(module: Any) -> list[Tensor]:
        shared, other = parameters(torch.float64, ((9,), (5,)))
        first = getattr(module, name)([shared], **TYPICAL[name])
        second = module.SGD([shared, other], lr=0.1, momentum=0.5)
        for step in range(3):
            draw([shared, other], step)
            first.step()
            second.step()
        return [*values(first, [shared]), *values(second, [shared, other])]

    torch.testing.assert_close(run(optim), run(torch.optim), rtol=1e-12, atol=1e-13)


def test_a_group_of_several_dtypes(backend: str) -> None:
    """One kernel call for each; torch's own step takes them all."""
    params = [*parameters(torch.float32, ((9,), (5,))), *parameters(torch.bfloat16, ((7,),))]
    optimizer = optim.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    choices = llmkern.explain(optimizer.step)
    assert choices.backends == (backend, backend)
    for p, was in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), was * (1 - 0.1 * 0.01) - 0.1)


def test_a_graph_that_needs_the_old_values_notices(backend: str) -> None:
    (p,) = parameters(torch.float32, ((9,),))
    y = (p * p).sum()
    p.grad = torch.ones(9)
    optim.Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


FALLBACKS = {"capturable": {"capturable": True}, "differentiable": {"differentiable": True}}


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"lr": torch.tensor(0.1)}])
def test_what_names_an_implementation_of_torchs_changes_nothing(name: str, options: dict[str, Any]) -> None:
    def run(**more: Any) -> list[Tensor]:
        params = parameters(torch.float32, ((7,), (5, 13)))
        optimizer = getattr(optim, name)(params, **({"lr": 0.1} | more))
        draw(params, 0)
        assert not NATIVE or llmkern.explain(optimizer.step).backends == ("native",)
        return values(optimizer, params)

    torch.testing.assert_close(run(**options), run(), rtol=1e-6, atol=1e-7)


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


BAD = {
    "Adam": ({"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}),
    "SGD": ({"lr": -1.0}, {"momentum": -1.0}, {"weight_decay": -1.0}, {"nesterov": True}),
    "Adagrad": ({"lr": -1.0}, {"lr_decay": -1.0}, {"eps": -1.0}, {"initial_accumulator_value": -1.0}),
}


@pytest.mark.parametrize("name", NAMES)
def test_constructors_raise_torchs_errors(name: str) -> None:
    for options in BAD.get(name, BAD["Adam"]):
        messages = []
        for module in (optim, torch.optim):
            with pytest.raises(ValueError, match=r"Invalid|Nesterov") as error:
                getattr(module, name)([torch.ones(1)], **options)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="Invalid max_grad_norm: 0"):
        getattr(optim, name)([torch.ones(1)], max_grad_norm=0)
    with pytest.raises(ValueError, match=r"Invalid state_dtype: torch\.float16"):
        getattr(optim, name)([torch.ones(1)], state_dtype=torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_constructors_take_torchs_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, torch.optim))
    shared = {key: value for key, value in ours.items() if key not in ("max_grad_norm", "state_dtype")}
    assert [(k, p.default, p.kind) for k, p in shared.items()] == [(k, p.default, p.kind) for k, p in theirs.items()]


def test_a_gradient_of_another_shape_raises() -> None:
    (p,) = parameters(torch.float32, ((5, 3),))
    with pytest.raises(RuntimeError, match="size"):
        p.grad = torch.ones(3, 5)
