"""Values at the edges: not finite, none at all, and memory that is no longer there. What torch gives is right."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
import llmkern.functional as LF
import llmkern.nn as nn
from llmkern import dispatch

needs_native = pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="the native library is not built")
on_both = pytest.mark.parametrize("name", [pytest.param("native", marks=needs_native), "reference"])
NAN, INF = math.nan, math.inf


def equal(ours: Tensor | None, theirs: Tensor | None) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
        return
    if theirs.layout != torch.strided:
        ours, theirs = ours.to_dense(), theirs.to_dense()
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def outcome(function: Callable[..., Any], leaves: dict[str, Tensor], fixed: dict[str, Any]) -> Any:
    """The result and the gradients of `leaves`, or the error."""
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in leaves.items()}
    factor = fixed.pop("factor", 1)
    try:
        out = function(**leaves, **fixed) * factor
        if out.requires_grad:
            out.sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves.values())]
    except Exception as error:
        return type(error).__name__, str(error)


def compare(function: str, leaves: dict[str, Tensor], **fixed: Any) -> None:
    """Ours with torch's, gradients too: or their errors."""
    ours, theirs = (outcome(getattr(module, function), leaves, dict(fixed)) for module in (LF, F))
    same(ours, theirs)


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert not isinstance(ours, tuple), ours
    for a, b in zip(ours, theirs, strict=True):
        equal(a, b)


# --- not finite ---


def layer(module: Any, kind: str, place: str, value: float, **kwargs: Any) -> list[Tensor | None]:
    """Outputs and gradients of a layer with one number replaced."""
    torch.manual_seed(0)
    options = {"nonlinearity": kind[4:]} if kind.startswith("RNN_") else {}
    rnn = getattr(module, kind[:3] if kind.startswith("RNN_") else kind)(3, 17, **options, **kwargs)
    x, hx, dy = torch.randn(5, 3, 3), torch.randn(1, 3, 17), torch.randn(5, 3, 17)
    places = {"x": x[2, 1], "hx": hx[0, 1], "dy": dy[3, 2], "weight_hh": rnn.weight_hh_l0.data[2]}
    places[place][1] = value
    x.requires_grad_(), hx.requires_grad_()
    y, _ = rnn(x, (hx, torch.zeros_like(hx)) if kind == "LSTM" else None if kind == "sLSTM" else hx)
    (y * 1).backward(dy)
    return [y, x.grad, hx.grad, *(p.grad for p in rnn.parameters())]


@pytest.mark.parametrize("place", ["x", "hx", "dy", "weight_hh"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_tanh", "RNN_relu"])
def test_recurrent_layers_let_through_what_is_not_finite_where_torchs_do(kind: str, place: str) -> None:
    for value in (NAN, INF, -INF):
        for ours, theirs in zip(layer(nn, kind, place, value), layer(torch.nn, kind, place, value), strict=True):
            equal(ours, theirs)


@needs_native
@pytest.mark.parametrize(
    "options", [{"clip": 0.5}, {"zoneout": 0.3}, {"layer_norm": True}, {"num_heads": 1}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_relu", "sLSTM"])
def test_options_let_through_what_the_reference_lets_through(kind: str, options: dict[str, Any]) -> None:
    for place, value in itertools.product(("x", "dy", "weight_hh"), (NAN, INF)):
        with llmkern.backend("native"):
            ours = layer(nn, kind, place, value, **options)
        with llmkern.backend("reference"):
            theirs = layer(nn, kind, place, value, **options)
        for a, b in zip(ours, theirs, strict=True):
            equal(a, b)


@pytest.mark.kernels
def test_the_gradient_of_a_relu_layer_passes_at_nan(backend: str) -> None:
    rnn = nn.RNN(1, 1, nonlinearity="relu")
    for p in rnn.parameters():
        p.data.fill_(1)
    x = torch.full((2, 1, 1), NAN, requires_grad=True)
    rnn(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [2.0, 1.0]


@on_both
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_losses_and_their_gradients(name: str, value: float) -> None:
    for (N, C), reduction in itertools.product(((4, 7), (3, 2100)), ("mean", "sum", "none")):
        for place, options in itertools.product(
            (0, 2, C - 1), ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(C)}, {"ignore_index": 2})
        ):
            x = torch.randn(N, C)
            # Not in an ignored row: there ours is 0 (docs/differences.md).
            x[0, place] = value
            with llmkern.backend(name):
                compare(
                    "cross_entropy", {"input": x}, target=torch.tensor([0, 2, 1, 3])[:N], reduction=reduction, **options
                )


@on_both
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_squared_errors_and_lookups(name: str, value: float) -> None:
    x, y, weight, factor = torch.randn(5, 9), torch.randn(5, 9), torch.randn(6, 9), torch.randn(5, 9)
    x[1, 2] = y[2, 2] = weight[1, 2] = factor[1, 1] = factor[2, 2] = value
    indices = torch.tensor([2, 1, 3, 1, 4])
    with llmkern.backend(name):
        for reduction in ("mean", "sum", "none"):
            compare("mse_loss", {"input": x, "target": y}, reduction=reduction)
        for options in ({}, {"padding_idx": 1}, {"scale_grad_by_freq": True}):
            compare("embedding", {"weight": weight}, input=indices, factor=factor, **options)
        for mode, padding_idx in itertools.product(("sum", "mean", "max"), (None, 1)):
            fixed = {"input": indices, "offsets": torch.tensor([0, 3]), "mode": mode, "padding_idx": padding_idx}
            compare("embedding_bag", {"weight": weight}, factor=factor[1:3], **fixed)


@on_both
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, 0.0, 3.0])
def test_norms_of_rows(name: str, norm_type: float) -> None:
    for value in (NAN, INF):
        tables = torch.randn(6, 9).mul_(3).repeat(2, 1, 1)
        tables[:, 1, 2] = value
        with llmkern.backend(name):
            for f, table in zip((LF.embedding, F.embedding), tables, strict=True):
                f(torch.tensor([1, 2, 1]), table, max_norm=0.7, norm_type=norm_type)
        equal(*tables)


# --- none at all ---

NOTHING = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_nothing(reduction: str) -> None:
    for shape in ((0, 5), (3, 0), (0, 0), (0, 5, 2), (3, 5, 0), (3, 1)):
        for target in (torch.zeros(shape[0], *shape[2:], dtype=torch.int64), torch.rand(shape)):
            compare("cross_entropy", {"input": torch.randn(shape)}, target=target, reduction=reduction)
    for shape in ((0,), (0, 3), (3, 0)):
        compare("mse_loss", {"input": torch.randn(shape), "target": torch.randn(shape)}, reduction=reduction)


def composed(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, **fixed: Any) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), **fixed)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_of_no_width_no_rows_or_one_class(reduction: str) -> None:
    for (N, H, C), smoothing in itertools.product(((3, 0, 5), (0, 4, 5), (0, 0, 5), (3, 4, 1), (3, 0, 1)), (0.0, 0.1)):
        leaves = {"input": torch.randn(N, H), "linear_weight": torch.randn(C, H), "linear_bias": torch.randn(C)}
        fixed = {"target": torch.zeros(N).long(), "reduction": reduction, "label_smoothing": smoothing}
        same(outcome(LF.linear_cross_entropy, leaves, dict(fixed)), outcome(composed, leaves, dict(fixed)))
    assert LF.linear_cross_entropy(torch.randn(2, 3, 0), torch.randn(5, 0), torch.zeros(2, 3).long()).isfinite()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_tables_and_batches_of_nothing(options: dict[str, Any]) -> None:
    for V, D, N in ((0, 3, 0), (0, 0, 0), (5, 0, 2), (5, 3, 0), (0, 3, 2)):
        for shape in ((N,), (N, 0), (0, N)):
            compare("embedding", {"weight": torch.randn(V, D)}, input=torch.zeros(shape, dtype=torch.int64), **options)
    modes = ("sum", "mean", "max") if options.keys() <= {"padding_idx"} else ("sum", "mean")
    for mode, (V, D, N, offsets) in itertools.product(modes, ((5, 3, 0, [0, 0]), (5, 3, 0, []))):
        fixed = {"input": torch.zeros(N).long(), "offsets": torch.tensor(offsets).long(), "mode": mode, **options}
        compare("embedding_bag", {"weight": torch.randn(V, D)}, **fixed)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_indices_that_lie_in_no_bag_have_no_gradient(backend: str, mode: str) -> None:
    """torch reads memory that is not its own here, so there is nothing to compare with."""
    if backend == "torch":
        return
    indices = torch.tensor([1, 2, 3])
    for offsets, include_last_offset in ((NOTHING, False), (torch.tensor([0]), True)):
        weight = torch.randn(5, 3, requires_grad=True)
        y = LF.embedding_bag(indices, weight, offsets, mode=mode, include_last_offset=include_last_offset)
        assert y.shape == (0, 3)
        y.sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros(5, 3))
    with llmkern.backend("auto"), pytest.raises(RuntimeError, match=r"offsets\[0\] has to be 0"):
        LF.embedding_bag(indices, torch.randn(5, 3), torch.tensor([2]), mode=mode, include_last_offset=True)


# --- no longer there ---

FREED = "The tensor has a non-zero number of elements, but its data is not allocated yet."


def cross_entropy_parts() -> dict[str, Tensor]:
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    # The gradient of the loss alone was made in the forward.
    result = LF.cross_entropy(x, target, outputs=("lse",))
    return {"x": x, "target": target, "loss": result.loss + result.lse.sum()}


def mse_parts() -> dict[str, Tensor]:
    x, target = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    return {"x": x, "target": target, "loss": LF.mse_loss(x, target, reduction="none").sum()}


def lstm_parts() -> dict[str, Tensor]:
    lstm, x = nn.LSTM(5, 6, layer_norm=True), torch.randn(3, 2, 5)
    y = lstm(x)[0]
    return {"x": x, "weight": lstm.weight_hh_l0, "loss": (y * 1).sum()}


def linear_parts() -> dict[str, Tensor]:
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    loss = LF.linear_cross_entropy(x, weight, target, reduction="none").sum()
    return {"x": x, "weight": weight, "target": target, "loss": loss}


def lookup_parts() -> dict[str, Tensor]:
    indices, weight = torch.tensor([0, 1, 2, 3]), torch.randn(4, 5, requires_grad=True)
    return {"indices": indices, "loss": LF.embedding(indices, weight).sum()}


def bag_parts() -> dict[str, Tensor]:
    indices, offsets = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2])
    weight, samples = torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    loss = LF.embedding_bag(indices, weight, offsets, mode="sum", per_sample_weights=samples).sum()
    return {"indices": indices, "offsets": offsets, "weight": weight, "samples": samples, "loss": loss}


@needs_native
@pytest.mark.parametrize(
    "parts",
    [cross_entropy_parts, mse_parts, lstm_parts, linear_parts, lookup_parts, bag_parts],
    ids=lambda f: f.__name__,
)
def test_memory_that_went_between_forward_and_backward_is_an_error(parts: Callable[[], dict[str, Tensor]]) -> None:
    with llmkern.backend("native"):
        for name in parts().keys() - {"loss"}:
            for left, text in ((0, FREED), (4, r"setStorage: sizes .* requiring a storage size of \d+ are out of")):
                made = parts()
                made[name].untyped_storage().resize_(left)
                with pytest.raises(RuntimeError, match=text):
                    made["loss"].backward()


@needs_native
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_step_on_memory_that_went_is_an_error_and_changes_nothing(name: str) -> None:
    for place in ("grad", "param", "state"):
        params = [torch.nn.Parameter(torch.randn(4, 5)) for _ in range(2)]
        for p in params:
            p.grad = torch.randn(4, 5)
        optimizer = getattr(llmkern.optim, name)(params, lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
        optimizer.step()
        last = params[1]
        state = next(v for v in optimizer.state[last].values() if isinstance(v, Tensor) and v.dim())
        before = params[0].detach().clone()
        {"grad": last.grad, "param": last.data, "state": state}[place].untyped_storage().resize_(0)
        with llmkern.backend("native"), pytest.raises(RuntimeError, match=FREED):
            optimizer.step()
        assert torch.equal(params[0], before)


@needs_native
def test_ops_that_are_called_by_hand_refuse_what_has_no_memory() -> None:
    op = torch.ops.llmkern_cpu
    weight, indices, rows = torch.randn(5, 3), torch.tensor([1, 2]), torch.randn(2, 3)
    calls = {
        "bags": lambda: op.embedding_bag_forward(weight, None, indices, None, -1, False, False, -1),
        "2^31": lambda: op.embedding_bag_forward(weight, None, NOTHING, None, 1 << 60, False, False, -1),
        "num_weights": lambda: op.embedding_backward(rows, indices, -5, -1, False),
        "negative": lambda: op.embedding_bag_backward(rows, None, indices, None, None, -5, False, False, -1, False),
        "rows": lambda: op.embedding_backward(rows, indices, 1 << 62, -1, False),
        "contiguous": lambda: op.embedding_forward(torch.randn(3, 5).t(), indices),
        "float32": lambda: op.embedding_forward(torch.ones(5, 3, dtype=torch.int64), indices),
        "int32 or int64": lambda: op.embedding_forward(weight, indices.float()),
        "dimensions": lambda: op.embedding_bag_backward(rows[0], None, indices, None, None, 5, False, False, -1, False),
        "per_sample_weights": lambda: op.embedding_bag_forward(
            weight, torch.ones(1), indices, None, 1, False, False, -1
        ),
        "steps": lambda: op.advance([torch.zeros(2)]),
    }
    for text, call in calls.items():
        with pytest.raises((ValueError, RuntimeError), match=re.escape(text)):
            call()
