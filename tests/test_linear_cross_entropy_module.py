"""``LinearCrossEntropyLoss``: torch's module, on every torch."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import llmkern.nn as lnn

TORCH_HAS_IT = hasattr(F, "linear_cross_entropy")
needs_torch = pytest.mark.skipif(not TORCH_HAS_IT, reason="this torch has no linear_cross_entropy")


def constructors() -> list[dict[str, Any]]:
    return [
        {},
        {"bias": True, "reduction": "sum", "dtype": torch.double},
        {"out_features": (2, 3), "bias": True, "label_smoothing": 0.1},
        {"weight": torch.rand(7), "ignore_index": 2, "reduction": "none"},
    ]


@needs_torch
@pytest.mark.parametrize("keywords", constructors(), ids=repr)
def test_module_is_torchs(keywords: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = torch.nn.LinearCrossEntropyLoss(5, 7, **keywords)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = lnn.LinearCrossEntropyLoss(5, 7, **keywords)
    assert torch.equal(after, torch.rand(1)), "the random stream went on differently"
    assert isinstance(ours, torch.nn.LinearCrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    inner = keywords.get("out_features", ())
    x, t = torch.randn(4, 5, dtype=keywords.get("dtype")), torch.randint(7, (4, *inner))
    expected = theirs(x, t)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x, t), expected)


def test_module_signature_and_errors() -> None:
    ours = inspect.signature(lnn.LinearCrossEntropyLoss).parameters
    if TORCH_HAS_IT:
        theirs = inspect.signature(torch.nn.LinearCrossEntropyLoss).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[k].default == p.default and ours[k].kind == p.kind for k, p in theirs.items())
    with pytest.raises(RuntimeError, match=r"expected weight shape to be \(7,\), got \(6,\)"):
        lnn.LinearCrossEntropyLoss(5, 7, weight=torch.ones(6))
    with pytest.raises(RuntimeError, match=r"expected label_smoothing to be in range \[0, 1\], got 1.5"):
        lnn.LinearCrossEntropyLoss(5, 7, label_smoothing=1.5)
    assert repr(lnn.LinearCrossEntropyLoss(5, 7, z_loss=0.5)).count(", z_loss=0.5") == 1


def test_module_trains_without_a_warning() -> None:
    module = lnn.LinearCrossEntropyLoss(5, 7, bias=True)
    x, t = torch.randn(20, 5), torch.randint(7, (20,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            optimizer.zero_grad()
            loss = module(x, t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_torch_without_the_function() -> None:
    """torch 2.10 to 2.12, as far as this package can tell."""
    code = """
import torch, pickle, copy
for home in (torch.nn, torch.nn.modules, torch.nn.functional, torch.nn.modules.loss):
    for name in ("LinearCrossEntropyLoss", "LinearCrossEntropyOptions", "linear_cross_entropy"):
        if hasattr(home, name):
            delattr(home, name)
import llmkern.nn as nn, llmkern.functional as F
torch.manual_seed(3)
module = nn.LinearCrossEntropyLoss(5, 7, bias=True, weight=torch.ones(7))
torch.manual_seed(3)
linear = torch.nn.Linear(5, 7)
assert list(module.state_dict()) == ["weight", "linear.weight", "linear.bias"]
assert torch.equal(module.linear.weight, linear.weight) and torch.equal(module.linear.bias, linear.bias)
x, t = torch.randn(4, 5), torch.tensor([0, 3, 6, -100])
expected = torch.nn.functional.cross_entropy(linear(x), t)
for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
    torch.testing.assert_close(m(x, t), expected)
print(module)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].strip().startswith("in_features=5, num_classes=7, out_features=(), bias=True")
