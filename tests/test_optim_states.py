"""States, step counts and parameters that do not fit together: what torch makes of them, word for word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkern import optim
from llmkern.nn import Embedding

STATES = {"Adam": "exp_avg", "AdamW": "exp_avg_sq", "SGD": "momentum_buffer", "Adagrad": "sum", "SparseAdam": "exp_avg"}
V, D = 4, 6


def _other(change: Callable[[Tensor], Any]) -> Callable[..., None]:
    def mutate(optimizer: Any, p: Tensor, key: str) -> None:
        optimizer.state[p][key] = change(optimizer.state[p][key].detach().clone())

    return mutate


def _count(value: Any) -> Callable[..., None]:
    return lambda optimizer, p, key: optimizer.state[p].__setitem__("step", copy.deepcopy(value))


def _become(change: Callable[[Tensor], Tensor], grad: Tensor) -> Callable[..., None]:
    def mutate(optimizer: Any, p: Tensor, key: str) -> None:
        p.grad = None
        p.data = change(p.data)
        p.grad = grad.clone()

    return mutate


def _load(change: Callable[[dict[str, Any], str], Any]) -> Callable[..., None]:
    def mutate(optimizer: Any, p: Tensor, key: str) -> None:
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved, key)
        optimizer.load_state_dict(saved)

    return mutate


MISFITS: dict[str, Callable[..., None]] = {
    "transposed": _other(lambda t: t.t()),
    "transposed copy": _other(lambda t: t.t().contiguous()),
    "other strides": _other(lambda t: t.t().contiguous().t()),
    "flat": _other(lambda t: t.flatten()),
    "three dimensions": _other(lambda t: t.view(2, 2, D)),
    "larger": _other(lambda t: torch.zeros(V + 1, D)),
    "a row": _other(lambda t: t[0].clone()),
    "fp64": _other(lambda t: t.double()),
    "bf16": _other(lambda t: t.bfloat16()),
    "integers": _other(lambda t: t.long()),
    "meta": _other(lambda t: t.to("meta")),
    "a list": _other(lambda t: t.tolist()),
    "none": _other(lambda t: None),
    "missing": lambda optimizer, p, key: optimizer.state[p].pop(key),
    "empty": lambda optimizer, p, key: optimizer.state[p].clear(),
    "no count": lambda optimizer, p, key: optimizer.state[p].pop("step"),
    "int count": _count(3),
    "float count": _count(3.0),
    "count of one element": _count(torch.tensor([3.0])),
    "long count": _count(torch.tensor(3)),
    "two counts": _count(torch.ones(2)),
    "reshaped parameter": _become(lambda t: t.reshape(D, V), torch.ones(D, V)),
    "transposed parameter": _become(lambda t: t.t(), torch.ones(V, D).t()),
    "transposed and copied": _become(lambda t: t.t().contiguous(), torch.ones(D, V)),
    "permuted checkpoint": _load(lambda saved, key: saved["state"][0].update({key: saved["state"][0][key].t()})),
    "foreign checkpoint": _load(lambda saved, key: saved["state"].update({0: {"step": torch.tensor(1.0)}})),
    "old checkpoint": _load(lambda saved, key: saved["state"][0].update(step=3.0)),
    "another group": _load(lambda saved, key: saved["param_groups"].append(saved["param_groups"][0])),
    "no state": _load(lambda saved, key: saved["state"].clear()),
    "half a checkpoint": _load(lambda saved, key: saved.pop("state")),
}


def attempt(library: Any, name: str, rows: bool, mutate: Callable[..., None]) -> tuple[Any, ...]:
    """The error, or the parameter and its state."""
    ours = rows and library is optim
    module = Embedding(V, D, row_grad=True) if ours else torch.nn.Embedding(V, D, sparse=name == "SparseAdam")
    module.load_state_dict({"weight": torch.arange(float(V * D)).view(V, D)})
    p = module.weight
    optimizer = getattr(library, name)([p], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
    for attempted in (False, True):
        optimizer.zero_grad()
        module(torch.tensor([1, 2])).sum().backward()
        try:
            if attempted:
                mutate(optimizer, p, STATES[name])
            optimizer.step()
        except Exception as error:
            return type(error), str(error)
    return p.detach().clone(), optimizer.state_dict()["state"].get(0, {})


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("name", STATES)
def test_what_does_not_fit_is_torchs_business(name: str, misfit: str) -> None:
    want = attempt(torch.optim, name, False, MISFITS[misfit])
    for rows in (False, True) if name != "SparseAdam" else (False,):
        got = attempt(optim, name, rows, MISFITS[misfit])
        if isinstance(want[0], Tensor):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert got == want
