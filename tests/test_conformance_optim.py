"""torch's own samples of optimizers (``OptimizerInfo``), for every one that ``llmkern.optim`` replaces: parameters,
states, errors and ``state_dict`` after steps are torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import Observation, assert_alike, assert_works, leaves, observe
from torch import Tensor
from torch.testing._internal.common_optimizers import optim_db

import llmkern.optim as optim

INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in optim.__all__}
# What torch lets one combine with any of its implementations.
FLAGS = ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}, {"capturable": True})


def classes(name: str) -> tuple[Any, Any]:
    return getattr(optim, name), getattr(torch.optim, name)


def parameters(sparse: bool, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Some of a few shapes; not all get a gradient."""
    g = torch.Generator().manual_seed(1)
    shapes = [(6, 4)] if sparse else [(6, 4), (5,), (), (0, 3), (2, 2)]
    made = [torch.nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in shapes]
    return made if sparse else [*made, torch.nn.Parameter(torch.randn(4, 3, generator=g, dtype=dtype).t())]


def gradients(params: list[torch.nn.Parameter], sparse: bool, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        if i == 4:
            continue
        grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
        if sparse:
            rows = torch.randint(p.shape[0], (1, 5), generator=g)
            grad = torch.sparse_coo_tensor(rows, grad[rows[0]], p.shape)
        p.grad = grad


def _built(cls: Any, params: Any, options: dict[str, Any]) -> Any:
    # A learning rate in fp32 would round torch's sparse steps of fp64.
    return cls(params, **{key: v.double() if isinstance(v, Tensor) else v for key, v in options.items()})


def trained(
    cls: Any, options: dict[str, Any], sparse: bool = False, dtype: torch.dtype = torch.float32, steps: int = 3
) -> Observation:
    """Steps with all that a training loop does to an optimizer; what is left are parameters, states and groups."""

    def run() -> Any:
        params = parameters(sparse, dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}] if len(params) > 2 else params
        optimizer = _built(cls, groups, options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        seen = []
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(len(args)))
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(len(kwargs)))
        for step in range(steps):
            gradients(params, sparse, step)
            if options.get("differentiable"):
                with torch.no_grad():
                    optimizer.step()
            else:
                loss = optimizer.step(lambda: torch.tensor(2.5))
                assert float(loss) == 2.5
            scheduler.step()
            if step == 1:
                optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        held = [optimizer.state[p] for p in params]
        # torch's fused steps do not say that they wrote; more than one write is nobody's business.
        assert options.get("fused") or all(p._version > 0 for p in params if p.grad is not None)
        assert len(seen) == 2 * steps
        state = optimizer.state_dict()
        groups = [{k: v for k, v in group.items() if k not in ("max_grad_norm",)} for group in state["param_groups"]]
        result = [*params, *leaves(held), *leaves(groups), *(p.grad for p in params if p.grad is not None)]
        kinds = [(sorted(s), [type(v) for v in s.values()]) for s in held]
        return result, (kinds, state["state"].keys(), str(groups))

    facts: list[Any] = []

    def call() -> list[Tensor]:
        result, told = run()
        facts.append(told)
        return [t.detach() for t in result]

    seen = observe(call)
    seen.facts["told"] = str(facts)
    return seen


def _combinations(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    info = INFOS[name]
    for sample in info.optim_inputs_func(device="cpu"):
        yield sample.desc, sample.kwargs
    # Implementations, with the richest of torch's samples.
    richest = max(info.optim_inputs_func(device="cpu"), key=lambda sample: len(sample.kwargs)).kwargs
    for flags in FLAGS[1:]:
        if next(iter(flags)) in classes(name)[1].__init__.__code__.co_varnames:
            yield str(flags), {**richest, **flags}


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_every_sample(name: str, dtype: torch.dtype) -> None:
    info = INFOS[name]
    sparse = info.only_supports_sparse_grads
    for words, options in _combinations(name):
        ours, theirs = (trained(cls, options, sparse, dtype) for cls in classes(name))
        # Differentiable steps want no leaves, capturable ones a GPU: there the errors are compared.
        if dtype == torch.float64 and not {"differentiable", "capturable"} & options.keys():
            assert_works(theirs, words)
        # torch's fused steps round elsewhere than its loop does.
        exact = None
        if dtype in (torch.float32, torch.bfloat16) and "error" not in theirs.facts:
            exact = trained(classes(name)[1], options, sparse, torch.float64)
        assert_alike(ours, theirs, (words, options), exact)


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.supports_sparse])
def test_sparse_gradients(name: str) -> None:
    for words, options in _combinations(name):
        ours, theirs = (trained(cls, options, True, torch.float64) for cls in classes(name))
        assert_alike(ours, theirs, (words, options))


@pytest.mark.parametrize("name", INFOS)
def test_malformed_options_raise_torchs_errors(name: str) -> None:
    cases = INFOS[name].optim_error_inputs_func("cpu", torch.float32)
    assert len(cases) > 5
    for case in cases:
        given = case.optimizer_error_input
        params = parameters(False) if given.params is None else given.params
        ours, theirs = (
            observe(lambda c=cls, given=given, params=params: c(params, **given.kwargs) and ()) for cls in classes(name)
        )
        assert "error" in theirs.facts or theirs.facts["warnings"], given.desc
        assert_alike(ours, theirs, given.desc)


@pytest.mark.parametrize("name", INFOS)
def test_either_goes_on_from_the_others_state(name: str) -> None:
    sparse = INFOS[name].only_supports_sparse_grads
    for words, options in _combinations(name):
        if {"differentiable", "capturable"} & options.keys():
            continue
        ends = []
        for first in classes(name):
            for second in classes(name):
                params = parameters(sparse, torch.float64)
                before = _built(first, params, options)
                for step in range(2):
                    gradients(params, sparse, step)
                    before.step()
                after = _built(second, params, options)
                after.load_state_dict(before.state_dict())
                gradients(params, sparse, 2)
                after.step()
                ends.append([p.detach() for p in params])
        for other in ends[1:]:
            for a, b in zip(other, ends[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=words)


@pytest.mark.parametrize("name", INFOS)
def test_groups_that_are_added_and_copies(name: str) -> None:
    sparse = INFOS[name].only_supports_sparse_grads

    def run(cls: Any) -> list[Tensor]:
        optimizer, results = cls(parameters(sparse, torch.float64), lr=0.1), []
        optimizer.add_param_group({"params": parameters(sparse, torch.float64), "lr": 0.01})
        for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            held = [p for group in other.param_groups for p in group["params"]]
            gradients(held, sparse, 1)
            other.step()
            other.zero_grad()
            assert all(p.grad is None for p in held)
            results += [p.detach() for p in held]
        assert repr(optimizer).splitlines()[0] == f"{name} ("
        return results

    ours, theirs = (observe(run, (cls,)) for cls in classes(name))
    assert_alike(ours, theirs, name)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_differentiable_steps_have_gradients(name: str) -> None:
    moved = []
    for cls in classes(name):
        start = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
        parameter = start.detach().clone()
        optimizer = cls([parameter], lr=0.1, differentiable=True)
        parameter.grad = start * 2
        optimizer.step()
        moved.append(torch.autograd.grad(parameter.sum(), start)[0])
    torch.testing.assert_close(*moved)
    assert moved[0].abs().min() > 0
