"""``torch.func`` and its like over every op: right wherever torch is, and wherever the reference is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as TF
from torch import Tensor
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import llmkern
import llmkern.functional as LF
from llmkern import nn

Function = Callable[[Tensor, Tensor], Tensor]

INDICES = torch.tensor([[1, 2, 1], [0, 3, 2]])
TARGET = torch.tensor([1, 2, -100])


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


def recurrent(name: str, weight: str) -> tuple[Callable[[Any], Function], Tensor]:
    torch.manual_seed(1)
    module = getattr(nn, name)(3, 2, dtype=torch.float64)

    def function(_: Any) -> Function:
        def call(x: Tensor, w: Tensor) -> Tensor:
            out = functional_call(module, {weight: w}, (x,))
            return out[0] if isinstance(out, tuple) else out

        return call

    return function, module.get_parameter(weight).detach().clone()


GRU, GRU_WEIGHT = recurrent("GRU", "weight_ih_l0")
LSTM, LSTM_WEIGHT = recurrent("LSTM", "weight_hh_l0")
CELL, CELL_WEIGHT = recurrent("LSTMCell", "weight_ih")

# A function of torch.nn.functional, or ours, and the two tensors that it is differentiated by.
CASES: dict[str, tuple[Callable[[Any], Function], Tensor, Tensor]] = {
    "embedding": (lambda F: lambda x, w: F.embedding(INDICES, x, padding_idx=1) * w, randn(5, 3), randn(3)),
    "embedding_bag": (
        lambda F: lambda x, w: F.embedding_bag(INDICES, x, mode="sum", per_sample_weights=w),
        randn(5, 3),
        randn(2, 3),
    ),
    "embedding_bag max": (lambda F: lambda x, w: F.embedding_bag(INDICES, x, mode="max") * w, randn(5, 3), randn(3)),
    "linear": (lambda F: lambda x, w: F.linear(x, w), randn(2, 3), randn(4, 3)),
    "cross_entropy": (lambda F: lambda x, w: F.cross_entropy(x * w, TARGET), randn(3, 4), randn(4)),
    "probabilities": (
        lambda F: lambda x, w: F.cross_entropy(x, w.softmax(-1), reduction="none", label_smoothing=0.1),
        randn(3, 4),
        randn(3, 4) / 2,
    ),
    "linear_cross_entropy": (
        lambda F: lambda x, w: LF.linear_cross_entropy(x, w, TARGET) if F is LF else TF.cross_entropy(x @ w.T, TARGET),
        randn(3, 4),
        randn(5, 4),
    ),
    "mse_loss": (lambda F: lambda x, w: F.mse_loss(x, w), randn(3, 4), randn(3, 4) / 2),
    "layer_norm": (lambda F: lambda x, w: F.layer_norm(x, (4,), w, w / 2), randn(3, 4), randn(4)),
    "rms_norm": (lambda F: lambda x, w: F.rms_norm(x, (4,), w), randn(3, 4), randn(4)),
    "fused_embedding": (
        lambda F: lambda x, w: LF.fused_embedding(INDICES, x, norm="rms", norm_weight=w),
        randn(5, 3),
        randn(3),
    ),
    "gru": (GRU, randn(3, 2, 3), GRU_WEIGHT),
    "lstm": (LSTM, randn(3, 2, 3), LSTM_WEIGHT),
    "lstm_cell": (CELL, randn(2, 3), CELL_WEIGHT),
}


def scalar(f: Function) -> Function:
    return lambda x, w: f(x, w).sin().sum()


def stacked(x: Tensor) -> Tensor:
    return torch.stack([x, -x, x / 2])


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def backward_outside(f: Function, x: Tensor, w: Tensor) -> Any:
    """An ensemble: a backward through what vmap made."""
    xs, ws = leaves(stacked(x), stacked(w))
    return torch.autograd.grad(vmap(f)(xs, ws).sin().sum(), (xs, ws))


def backward_outside_of_a_shared_weight(f: Function, x: Tensor, w: Tensor) -> Any:
    xs, ws = leaves(stacked(x), w)
    first = torch.autograd.grad(vmap(f, (0, None))(xs, ws).sin().sum(), (xs, ws), create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), (xs, ws))


def grad_and_then_backward(f: Function, x: Tensor, w: Tensor) -> Any:
    x, w = leaves(x, w)
    return torch.autograd.grad(grad(scalar(f))(x, w).square().sum(), (x, w))


def batched_gradients(f: Function, x: Tensor, w: Tensor) -> Any:
    x, w = leaves(x, w)
    y = f(x, w)
    return torch.autograd.grad(y, (x, w), torch.stack([y.detach().cos(), y.detach()]), is_grads_batched=True)


def reverse_over_forward(f: Function, x: Tensor, w: Tensor) -> Any:
    x, w = leaves(x, w)
    with forward_ad.dual_level():
        y = scalar(f)(forward_ad.make_dual(x, x.detach().cos()), w)
        return torch.autograd.grad(forward_ad.unpack_dual(y).tangent, (x, w), allow_unused=True)


def reverse_over_reverse(f: Function, x: Tensor, w: Tensor) -> Any:
    """What ``reverse_over_forward`` gives; torch's losses cannot be differentiated that way."""
    x, w = leaves(x, w)
    (first,) = torch.autograd.grad(scalar(f)(x, w), x, create_graph=True)
    return torch.autograd.grad((first * x.detach().cos()).sum(), (x, w))


def backward_inside_make_fx(f: Function, x: Tensor, w: Tensor) -> Any:
    def gradients(x: Tensor, w: Tensor) -> Any:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(scalar(f)(x, w), (x, w))

    return make_fx(gradients)(x, w)(2 * x, w / 2)


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, w: grad(scalar(f), (0, 1))(x, w),
    "hessian": lambda f, x, w: hessian(scalar(f))(x, w),
    "hessian by weight": lambda f, x, w: hessian(scalar(f), 1)(x, w),
    "jvp of grad": lambda f, x, w: jvp(lambda x: grad(scalar(f))(x, w), (x,), (x.cos(),)),
    "jacrev of jacrev": lambda f, x, w: jacrev(jacrev(scalar(f)))(x, w),
    "jacfwd of jacfwd": lambda f, x, w: jacfwd(jacfwd(scalar(f)))(x, w),
    "jacrev of jacfwd": lambda f, x, w: jacrev(jacfwd(scalar(f)))(x, w),
    "vmap": lambda f, x, w: vmap(f, (-1, 0), -1)(torch.stack([x, -x], -1), torch.stack([w, w / 2])),
    "vmap of vmap": lambda f, x, w: vmap(vmap(f, (0, None)), (None, 0))(stacked(x), stacked(w)),
    "vmap in chunks": lambda f, x, w: vmap(f, (0, None), chunk_size=2)(stacked(x), w),
    "vmap of grad": lambda f, x, w: vmap(grad(scalar(f), (0, 1)), (0, None))(stacked(x), w),
    "vmap of jvp": lambda f, x, w: vmap(lambda x, v: jvp(lambda x: f(x, w), (x,), (v,)))(stacked(x), stacked(x)),
    "grad of vmap": lambda f, x, w: grad(lambda w: vmap(f, (0, None))(stacked(x), w).sin().sum())(w),
    "linearize": lambda f, x, w: linearize(lambda x: f(x, w), x)[1](x.cos()),
    "functionalize": lambda f, x, w: functionalize(f)(x, w),
    "make_fx of grad": lambda f, x, w: make_fx(grad(scalar(f), (0, 1)))(x, w)(2 * x, w / 2),
    "make_fx of vmap": lambda f, x, w: make_fx(vmap(f, (0, None)))(stacked(x), w)(stacked(x) * 2, w / 2),
    "autograd's hessian": lambda f, x, w: torch.autograd.functional.hessian(scalar(f), (x, w)),
    "autograd's hessian, vectorized": lambda f, x, w: torch.autograd.functional.hessian(
        scalar(f), (x, w), vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd's jacobian, vectorized": lambda f, x, w: torch.autograd.functional.jacobian(f, (x, w), vectorize=True),
    "backward outside": backward_outside,
    "backward outside of a shared weight": backward_outside_of_a_shared_weight,
    "grad, then backward": grad_and_then_backward,
    "batched gradients": batched_gradients,
    "reverse over forward": reverse_over_forward,
    "backward inside make_fx": backward_inside_make_fx,
}
# torch cannot do all of it with these.
BY_REFERENCE = ("embedding_bag", "embedding_bag max", "fused_embedding", "gru", "lstm", "lstm_cell", "mse_loss")


# make_fx, on which linearize rests, asks a TorchFunctionMode, so that torch's functions serve: it has none of these.
TORCH_LACKS = {
    **dict.fromkeys(("embedding_bag", "embedding_bag max"), ("linearize",)),
    **dict.fromkeys(("gru", "lstm", "lstm_cell"), ("linearize", "make_fx of vmap")),
}
PAIRS = [(c, t) for c in CASES for t in TRANSFORMS if t not in TORCH_LACKS.get(c, ())]


@pytest.mark.parametrize(("case", "transform"), PAIRS)
def test_transforms_give_what_torch_or_the_reference_gives(case: str, transform: str) -> None:
    function, x, w = CASES[case]
    run = TRANSFORMS[transform]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = tree_leaves(run(function(LF), x, w))
        if run is reverse_over_forward and case in ("cross_entropy", "probabilities", "linear_cross_entropy"):
            run = reverse_over_reverse
        if case in BY_REFERENCE:
            with llmkern.backend("reference"):
                expected = tree_leaves(run(function(LF), x, w))
        else:
            expected = tree_leaves(run(function(TF), x, w))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_an_ensemble_of_modules_trains() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.GRUCell(4, 2)).double() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = randn(3, 5, 3)

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return LF.mse_loss(functional_call(models[0], (parameters, buffers), (x,)), x[:, :2])

    vmap(loss)(parameters, buffers, x).sum().backward()
    for i, model in enumerate(models):
        LF.mse_loss(model(x[i]), x[i][:, :2]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], parameter.grad)


def test_gradients_of_every_sample() -> None:
    model, x, y = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double(), INDICES.flatten(), INDICES.flatten() % 3
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, x: Tensor, y: Tensor) -> Tensor:
        return LF.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    got = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(len(x)):
        expected = torch.autograd.grad(TF.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), tuple(parameters.values()))
        for ours, theirs in zip((got[name][i] for name in parameters), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_vmap_has_its_rules_for_dropout() -> None:
    x = torch.ones(4, 64)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(LF.dropout)(x)
    different = vmap(LF.dropout, randomness="different")(x)
    same = vmap(LF.dropout, randomness="same")(x)
    assert not torch.equal(different[0], different[1])
    assert torch.equal(same[0], same[1])
    for y in (different, same):
        assert set(y.unique().tolist()) == {0.0, 2.0}


COMPILED: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "jvp": lambda f, x, w: jvp(lambda x: f(x, w), (x,), (x.cos(),)),
    "vmap": lambda f, x, w: vmap(f)(stacked(x), stacked(w)),
}


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("case", ["cross_entropy", "lstm_cell"])
def test_transforms_in_compiled_code(case: str, transform: str) -> None:
    function, x, w = CASES[case]
    run = COMPILED[transform]
    ours = function(LF)
    ours(x, w)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: run(ours, x, w), backend="aot_eager", fullgraph=True)
    with llmkern.backend("reference"):
        expected = tree_leaves(run(ours, x, w))
    points = leaves(x, w) if transform == "vmap" else [x, w]
    got = tree_leaves(compiled(*points))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    if transform == "vmap":
        expected = torch.autograd.grad(run(ours, *points).sin().sum(), points)
        for a, b in zip(torch.autograd.grad(got[0].sin().sum(), points), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_explain_says_where_a_transform_goes_past_the_kernels() -> None:
    x, w = randn(3, 4), randn(3, 4)
    inner = llmkern.explain(lambda: jacfwd(jacfwd(lambda x: LF.mse_loss(x, w)))(x))
    assert inner.backends == ("torch",)
    assert "does not serve forward mode inside forward mode" in str(inner)
    assert "native" in llmkern.explain(lambda: hessian(lambda x: LF.mse_loss(x, w))(x)).backends
