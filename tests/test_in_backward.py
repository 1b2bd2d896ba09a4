"""Steps inside the backward: the same training, with no gradient left, and an error where it would be another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmkern import nn, optim


def model(row_grad: bool = False) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(nn.Embedding(30, 17, row_grad=row_grad), nn.Linear(17, 17), nn.Linear(17, 5))


def batch(i: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(i)
    return torch.randint(30, (6,), generator=g), torch.randn(6, 5, generator=g)


def train(m: torch.nn.Module, optimizer: Any, inside: bool) -> list[Tensor]:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for i in range(7):
        indices, dout = batch(i)
        (m(indices) * dout).sum().backward()
        if not inside:
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in m.parameters())
        scheduler.step()
    return [p.detach() for p in m.parameters()]


OPTIMIZERS = {
    "ours": lambda p: optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}], lr=0.01),
    "sgd": lambda p: optim.SGD(p, lr=0.01, momentum=0.9),
    "torch's": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row_grad", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_same_training(name: str, row_grad: bool) -> None:
    if row_grad and name == "torch's":
        pytest.skip("torch's Adagrad knows no row parameters")
    outside, inside = model(), model(row_grad)
    want = train(outside, OPTIMIZERS[name](list(outside.parameters())), inside=False)
    optimizer = OPTIMIZERS[name](list(inside.parameters()))
    with optim.in_backward(optimizer):
        got = train(inside, optimizer, inside=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # The end of the block is the end of it.
    (inside(batch(0)[0])).sum().backward()
    assert all(p.grad is not None for p in inside.parameters())
    optimizer.step()


def test_a_tied_parameter_is_stepped_once_with_the_sum_of_its_gradients() -> None:
    def tied(library: Any, inside: bool) -> Tensor:
        torch.manual_seed(1)
        embedding = nn.Embedding(9, 4)
        optimizer = library.SGD(embedding.parameters(), lr=0.1)
        handle = optim.in_backward(optimizer) if inside else None
        for i in range(3):
            optimizer.zero_grad()
            x = embedding(torch.tensor([i, 1]))
            (x @ embedding.weight.T).logsumexp(-1).sum().backward()
            if handle is None:
                optimizer.step()
        return embedding.weight.detach()

    torch.testing.assert_close(tied(optim, True), tied(torch.optim, False))


def test_what_would_be_wrong_is_an_error() -> None:
    m = model()
    optimizer = optim.Adam(m.parameters())
    m(batch(0)[0]).sum().backward()
    with pytest.raises(ValueError, match="parameters with gradients"):
        optim.in_backward(optimizer)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="LBFGS"):
        optim.in_backward(torch.optim.LBFGS(m.parameters()))
    with pytest.raises(ValueError, match="max_grad_norm"):
        optim.in_backward(optim.SGD(m.parameters(), lr=1.0, max_grad_norm=1.0))
    with optim.in_backward(optimizer):
        with pytest.raises(RuntimeError, match="steps inside the backward"):
            optimizer.step()
        loss = (m(batch(0)[0]) ** 2).sum()
        before = [p.detach().clone() for p in m.parameters()]
        with pytest.raises(RuntimeError, match="create_graph=True"):
            loss.backward(create_graph=True)
        assert all(torch.equal(p, b) for p, b in zip(m.parameters(), before, strict=True))
        m.zero_grad()
        # A graph that the step has changed the parameters of.
        loss = (m(batch(0)[0]) ** 2).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
