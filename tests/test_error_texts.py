"""Malformed calls: torch's type and text, on every path. What is compared is asked of torch, in the version at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import llmkern
import llmkern.functional as LF

T = torch.tensor
WEIGHT, EMPTY = torch.randn(5, 3), torch.zeros(0, dtype=torch.int64)
X, Y = torch.randn(4, 5), T([0, 1, 2, 3])

TABLES = {
    "contiguous": WEIGHT,
    "transposed": torch.randn(3, 5).t(),
    "float64": WEIGHT.double(),
    "bfloat16": WEIGHT.bfloat16(),
    "no rows": torch.randn(0, 3),
    "no columns": torch.randn(5, 0),
    "a parameter": torch.nn.Parameter(WEIGHT.clone()),
}

CALLS: dict[str, list[dict[str, Any]]] = {
    "embedding": [
        {"input": T([1.0]), "weight": WEIGHT},
        {"input": T([True]), "weight": WEIGHT},
        {"input": T([1], dtype=torch.uint8), "weight": WEIGHT},
        {"input": T([1], dtype=torch.int16), "weight": WEIGHT},
        {"input": [1], "weight": WEIGHT},
        {"input": None, "weight": WEIGHT},
        {"input": T([1]), "weight": None},
        {"input": T([1]), "weight": WEIGHT[0]},
        {"input": T([1]), "weight": WEIGHT[None]},
        {"input": T([1]), "weight": T(1.0)},
        {"input": T([1]), "weight": WEIGHT, "padding_idx": 5},
        {"input": T([1]), "weight": WEIGHT, "padding_idx": -6},
        {"input": T(7), "weight": WEIGHT},
        {"input": T([[1, -1]]), "weight": WEIGHT},
    ],
    "embedding_bag": [
        {"input": T([1, 2]), "weight": WEIGHT},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": [0]},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": T([0.0])},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": T([[0]])},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": T([1])},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": T([0, 3])},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": T([0], dtype=torch.int16)},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": EMPTY, "include_last_offset": True},
        {"input": T([1, 2]), "weight": WEIGHT, "offsets": T([2]), "include_last_offset": True},
        {"input": T([[1, 2]]), "weight": WEIGHT, "offsets": T([0])},
        {"input": T([[[1, 2]]]), "weight": WEIGHT},
        {"input": T(1), "weight": WEIGHT},
        {"input": T([1.0, 2.0]), "weight": WEIGHT, "offsets": T([0])},
        {"input": T([[1, 2]]), "weight": WEIGHT, "mode": "median"},
        {"input": T([[1, 2]]), "weight": WEIGHT, "padding_idx": 5},
        {"input": T([[1, 2]]), "weight": WEIGHT, "padding_idx": -6},
        {"input": T([[1, 2]]), "weight": WEIGHT, "mode": "sum", "per_sample_weights": torch.ones(2)},
        {"input": T([[1, 2]]), "weight": WEIGHT, "mode": "sum", "per_sample_weights": torch.ones(1, 2).double()},
        {"input": T([[1, 2]]), "weight": WEIGHT, "mode": "max", "per_sample_weights": torch.ones(1, 2)},
        {"input": T([[1, 2]]), "weight": WEIGHT[0]},
        {"input": T([[1, 2]]), "weight": T([[1, 2], [3, 4], [5, 6]])},
    ],
    "cross_entropy": [
        {"input": X, "target": T([0, 1, 2, 5])},
        {"input": X, "target": T([0, 1, 2, -1])},
        {"input": X, "target": Y[:3]},
        {"input": X, "target": Y.int()},
        {"input": X, "target": Y.float()},
        {"input": X, "target": Y[None]},
        {"input": X, "target": torch.rand(5, 4)},
        {"input": X, "target": None},
        {"input": T(1.0), "target": T(0)},
        {"input": X.long(), "target": Y},
        {"input": X[:, :0], "target": Y},
        {"input": X, "target": Y, "weight": torch.ones(4)},
        {"input": X, "target": Y, "label_smoothing": 1.5},
        {"input": X, "target": Y, "label_smoothing": -0.1},
        {"input": X, "target": Y, "reduction": "average"},
        {"input": X, "target": torch.rand(4, 5), "ignore_index": 1},
    ],
    "nll_loss": [
        {"input": X, "target": T([0, 1, 2, 5])},
        {"input": X, "target": Y[:3]},
        {"input": X, "target": Y.float()},
        {"input": X, "target": Y, "weight": torch.ones(4)},
    ],
    "mse_loss": [
        {"input": X, "target": None},
        {"input": X, "target": X.tolist()},
        {"input": X, "target": X, "reduction": "average"},
        {"input": X.long(), "target": X.long()},
        {"input": X, "target": X, "weight": torch.ones(3)},
    ],
    **{
        norm: [
            {"input": X, "normalized_shape": shape}
            for shape in ((4,), (), 5, [5.0], (5, 5), (3, 4, 5), (-1,), (True,), None, "5", torch.ones(1))
        ]
        + [
            {"input": X, "normalized_shape": (5,), "weight": torch.ones(4)},
            {"input": X, "normalized_shape": (5,), "weight": torch.ones(1, 5)},
            {"input": X, "normalized_shape": (5,), "weight": torch.ones(5).double()},
            {"input": X, "normalized_shape": (5,), "weight": torch.ones(5, device="meta")},
            {"input": X, "normalized_shape": (5,), "weight": [1.0] * 5},
            {"input": X, "normalized_shape": (5,), "eps": "small"},
            {"input": X.long(), "normalized_shape": (5,)},
            {"input": T(1.0), "normalized_shape": (1,)},
            {"input": X.tolist(), "normalized_shape": (5,)},
        ]
        for norm in ("layer_norm", "rms_norm")
    },
    "linear": [
        {"input": X, "weight": torch.randn(3, 4)},
        {"input": X, "weight": torch.randn(3, 5), "bias": torch.randn(4)},
        {"input": X, "weight": torch.randn(3, 5).double()},
        {"input": T(1.0), "weight": torch.randn(3, 5)},
        {"input": X, "weight": torch.randn(3, 5, 2)},
        {"input": X.long(), "weight": torch.randn(3, 5)},
    ],
}


def error_of(module: Any, function: str, call: dict[str, Any]) -> tuple[type, str] | None:
    try:
        getattr(module, function)(**call)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("function", "call"),
    [(name, call) for name, calls in CALLS.items() for call in calls],
    ids=lambda value: str(value)[:60],
)
def test_a_malformed_call_raises_what_torch_raises(function: str, call: dict[str, Any]) -> None:
    assert error_of(LF, function, call) == error_of(F, function, call)


@pytest.mark.parametrize("thing", [None, 1.5, [0.0, 0.0, 0.0], X.numpy(), "x"], ids=lambda thing: type(thing).__name__)
def test_what_is_no_tensor_or_number_is_refused_in_torchs_words(thing: Any) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("linear", (thing, X)),
        ("linear", (X, thing)),
        ("linear", (X, X, thing)),
        ("dropout", (thing,)),
        ("dropout", (X, thing)),
        ("dropout", (X, thing, False)),
        ("mse_loss", (thing, X)),
        ("mse_loss", (X, thing)),
        ("cross_entropy", (thing, Y)),
        ("cross_entropy", (X, thing)),
        ("cross_entropy", (X, Y, thing)),
    ]
    for function, arguments in calls:
        errors = []
        for module in (LF, F):
            try:
                getattr(module, function)(*arguments)
                errors.append(None)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert errors[0] == errors[1], (function, arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("table", TABLES)
def test_an_index_out_of_range_is_torchs_error_on_every_path(table: str, dtype: torch.dtype) -> None:
    """torch has five texts for it, by function, mode, dtype, layout and options."""
    for bad in (5, -1, 2**31 - 1):
        indices = T([0, bad, bad] if len(TABLES[table]) else [bad] * 3, dtype=dtype)
        calls = [
            *(("embedding", {"input": indices, **options}) for options in ({}, {"padding_idx": 0}, {"max_norm": 1.0})),
            *(
                ("embedding_bag", {**bags, "mode": mode, **options})
                for bags in ({"input": indices, "offsets": T([0, 1], dtype=dtype)}, {"input": indices[:2].view(1, 2)})
                for mode in ("sum", "mean", "max")
                for options in ({}, {"padding_idx": 0}, {"max_norm": 1.0})
            ),
        ]
        for function, call in calls:
            if not len(TABLES[table]):
                call.pop("padding_idx", None)
            ours, theirs = TABLES[table].detach().clone(), TABLES[table].detach().clone()
            ours.requires_grad_(TABLES[table].requires_grad), theirs.requires_grad_(TABLES[table].requires_grad)
            error = error_of(F, function, {**call, "weight": theirs})
            assert error is not None
            assert error_of(LF, function, {**call, "weight": ours}) == error
            assert torch.equal(ours, TABLES[table])


def test_an_index_out_of_range_is_the_same_error_on_a_forced_backend() -> None:
    for name in ("native", "reference", "torch"):
        if llmkern.dispatch.unavailable(name) is None:
            with llmkern.backend(name):
                assert error_of(LF, "embedding", {"input": T([5]), "weight": WEIGHT}) == (
                    IndexError,
                    "index out of range in self",
                )
