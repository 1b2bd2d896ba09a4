"""What the Triton kernels promise beyond values, for every op: repeatable bits, CUDA graphs, no synchronisation,
streams, the compiler, autocast, errors that leave the context alive, and tensors of more than 2^31 elements.

Most of it only a GPU can show (`pytest -m gpu`); what the interpreter can show too is marked `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from checks import INTERPRETING, assert_accurate
from torch import Tensor

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch, optim

DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
pytestmark = pytest.mark.gpu


class Call(NamedTuple):
    """An op on small inputs: ``function(*inputs)`` gives one tensor; those of floats get gradients."""

    op: str
    inputs: Callable[[], list[Tensor]]
    function: Callable[..., Tensor]


def recurrent(name: str, **options: bool) -> Call:
    """A layer of 9 units on 5 steps of 3 sequences of 7 numbers; its weights are inputs."""
    module = getattr(lnn, name)(7, 9, **options)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x)[0]

    shapes = [(5, 3, 7), *(tuple(p.shape) for p in module.parameters())]
    return Call(name.lower(), lambda: [torch.randn(shape) * 0.5 for shape in shapes], function)


# 67 columns: more than one vector and no multiple of any; rows repeat, so that gradients are sums.
CALLS = {
    "embedding": Call(
        "embedding", lambda: [torch.randn(11, 67), torch.randint(11, (300,))], lambda w, i: LF.embedding(i, w)
    ),
    "embedding_bag": Call(
        "embedding_bag", lambda: [torch.randn(11, 67), torch.randint(11, (9, 5))], lambda w, i: LF.embedding_bag(i, w)
    ),
    "fused_embedding": Call(
        "fused_embedding",
        lambda: [torch.randn(11, 67), torch.randn(20, 67), torch.ones(67), torch.zeros(67), torch.randint(11, (9, 20))],
        lambda w, p, g, b, i: LF.fused_embedding(i, w, p, norm="layer", norm_weight=g, norm_bias=b),
    ),
    "cross_entropy": Call(
        "cross_entropy", lambda: [torch.randn(33, 1003), torch.randint(1003, (33,))], LF.cross_entropy
    ),
    "linear_cross_entropy": Call(
        "linear_cross_entropy",
        lambda: [torch.randn(33, 40), torch.randn(1003, 40), torch.randint(1003, (33,))],
        LF.linear_cross_entropy,
    ),
    "mse_loss": Call("mse_loss", lambda: [torch.randn(33, 67), torch.randn(33, 67)], LF.mse_loss),
    "layer_norm": Call(
        "layer_norm", lambda: [torch.randn(33, 67), *torch.randn(2, 67)], lambda x, w, b: LF.layer_norm(x, (67,), w, b)
    ),
    "rms_norm": Call("rms_norm", lambda: [torch.randn(33, 67), torch.randn(67)], lambda x, w: LF.rms_norm(x, (67,), w)),
    "lstm": recurrent("LSTM"),
    "lstm, both directions": recurrent("LSTM", bidirectional=True),
    "gru": recurrent("GRU"),
    "slstm": recurrent("sLSTM"),
    "dropout": Call("dropout", lambda: [torch.randn(33, 67)], lambda x: LF.dropout(x, 0.3)),
}


def prepared(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(3)
    inputs = [t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for t in CALLS[name].inputs()]
    return [t.requires_grad_() if t.is_floating_point() else t for t in inputs]


def run(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients, for a cotangent that is the same each time."""
    torch.manual_seed(7)
    out = CALLS[name].function(*inputs)
    leaves = [t for t in inputs if t.is_floating_point()]
    cotangent = torch.linspace(-1, 2, max(out.numel(), 1), device=out.device)[: out.numel()].reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    if (reason := dispatch.unavailable("triton")) is not None:
        pytest.skip(reason)
    with llmkern.backend("triton"):
        yield


every_call = pytest.mark.parametrize("name", [n for n, call in CALLS.items() if "triton" in dispatch.TABLE[call.op]])


@pytest.mark.kernels
@every_call
def test_values(name: str) -> None:
    """Against the reference in fp64; dropout's mask is the same, of the same seed."""
    inputs = prepared(name)
    ours = run(name, inputs)
    with llmkern.backend("reference"):
        plain = run(name, inputs)
        wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
        truth = run(name, wide)
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.kernels
@every_call
def test_repeatable(name: str) -> None:
    inputs = prepared(name)
    first = run(name, inputs)
    for _ in range(2):
        assert all(map(torch.equal, first, run(name, inputs)))


STEPS = {
    "Adam": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 0.1},
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", STEPS)
def test_dense_steps(name: str) -> None:
    """Three steps on tensors of several sizes, clipped, against torch's own."""
    results = []
    for ns in (optim, torch.optim):
        torch.manual_seed(5)
        params = [torch.randn(size).to(DEVICE).requires_grad_() for size in (1, 1023, 1025, 5000)]
        optimizer = getattr(ns, name)(params, **STEPS[name])
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(DEVICE)
            clip = torch.nn.utils.clip_grad_norm_ if ns is torch.optim else lnn.utils.clip_grad_norm_
            clip(params, 20.0)
            optimizer.step()
        results.append([p.detach() for p in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("name", STEPS)
def test_row_steps(name: str) -> None:
    """A table whose rows wait is the one that dense steps give."""
    torch.manual_seed(5)
    weight, batches = torch.randn(50, 67), torch.randint(50, (4, 20))
    tables = []
    for row_grad in (True, False):
        table = lnn.Embedding(50, 67, _weight=weight.clone(), row_grad=row_grad).to(DEVICE)
        options = {k: v for k, v in STEPS[name].items() if k != "weight_decay"}
        optimizer = getattr(optim, name)(table.parameters(), **options)
        for batch in batches.to(DEVICE):
            optimizer.zero_grad()
            table(batch).square().sum().backward()
            optimizer.step()
        tables.append(table.weight.detach().clone())
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


def waited(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    result = function(*arguments)
    llmkern.synchronize()
    return result


@pytest.mark.kernels
def test_a_bad_index_is_an_error_and_no_more() -> None:
    """On a GPU a later call raises it, or `llmkern.synchronize`; either way the next call works."""
    weight = torch.randn(5, 8, device=DEVICE)
    good, bad = torch.tensor([0, 4], device=DEVICE), torch.tensor([0, 5, 1], device=DEVICE)
    with pytest.raises(IndexError, match="index out of range in self"):
        waited(LF.embedding, bad, weight)
    assert torch.equal(LF.embedding(good, weight), weight[good])
    logits = torch.randn(3, 4, device=DEVICE)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        waited(LF.cross_entropy, logits, torch.tensor([0, 9, 1], device=DEVICE))
    llmkern.synchronize()


@every_call
def test_no_synchronisation(name: str) -> None:
    inputs = prepared(name)
    run(name, inputs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "dropout"])
def test_under_a_cuda_graph(name: str) -> None:
    """Captured once, replayed on other values."""
    inputs, others = prepared(name), prepared(name)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(name, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, inputs)
    with torch.no_grad():
        for t, other in zip(inputs, others, strict=True):
            if t.is_floating_point():
                other.normal_()
                t.copy_(other)
    graph.replay()
    assert all(map(torch.equal, captured, run(name, others)))


@every_call
def test_on_another_stream(name: str) -> None:
    """Inputs that are still being written on that stream when the op is launched there."""
    inputs, expected = prepared(name), run(name, prepared(name))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
        results = run(name, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, results, expected))


@every_call
def test_compiled(name: str) -> None:
    inputs = prepared(name)
    function = CALLS[name].function
    if name != "dropout":
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(*inputs), function(*inputs))


@every_call
def test_autocast(name: str) -> None:
    """The dtypes of torch's own function."""
    inputs = prepared(name)
    with torch.autocast("cuda", torch.bfloat16):
        ours = run(name, inputs)
        if "triton" in dispatch.TABLE[CALLS[name].op] and name in ("embedding", "embedding_bag", "cross_entropy"):
            with llmkern.backend("torch"):
                assert [t.dtype for t in ours] == [t.dtype for t in run(name, inputs)]
    assert all(t.isfinite().all() for t in ours)


def test_more_than_2_to_31_elements() -> None:
    V = 32_000
    N = 2**31 // V + 3
    logits = torch.randn(N, V, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(V, (N,), device=DEVICE)
    loss = LF.cross_entropy(logits, target, reduction="none")
    (dlogits,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    last = logits.detach()[-2:].float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(last, target[-2:], reduction="none")
    assert_accurate(loss[-2:], expected, expected.to(loss.dtype), ulps=8)
    assert_accurate(dlogits[-2:], torch.autograd.grad(expected.sum(), last)[0], ulps=8)
    del logits, dlogits, loss
    weight, D = torch.randn(64, 2048, device=DEVICE, dtype=torch.bfloat16), 2048
    indices = torch.randint(64, (2**31 // D + 3,), device=DEVICE)
    assert torch.equal(LF.embedding(indices, weight)[-2:], weight[indices[-2:]])
