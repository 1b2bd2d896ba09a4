"""Embedding, positions, token types, norm and dropout in one: errors, and the module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import kernels

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch

OP = "fused_embedding"
NATIVE = dispatch.unavailable("native") is None


@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.randn(3)},
        {"input": torch.zeros(3, dtype=torch.int16)},
        {"weight": torch.randn(6)},
        {"padding_idx": 6},
        {"padding_idx": -7},
        {"input": torch.tensor([0, 6])},
        {"input": torch.tensor([-1, 0])},
    ],
    ids=repr,
)
def test_errors_of_the_lookup_are_torchs(change: dict[str, Any]) -> None:
    call = {"input": torch.zeros(3, dtype=torch.int64), "weight": torch.randn(6, 2), **change}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.embedding(**call)
    with pytest.raises(theirs.type) as ours:
        LF.fused_embedding(**call)
    assert str(ours.value) == str(theirs.value)


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"norm": "batch"}, "norm: got 'batch', expected 'layer', 'rms' or None"),
    ({"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
    ({"dropout": float("nan")}, "dropout probability"),
    ({"norm_weight": torch.ones(4)}, "without a norm"),
    ({"norm": "rms", "norm_bias": torch.ones(1)}, r"norm_bias: got shape \(1,\), expected \(4,\)"),
    ({"position_weight": torch.randn(9, 3)}, r"position_weight: got shape \(9, 3\), expected \(rows, 4\)"),
    ({"position_weight": torch.randn(4, 4)}, "position_weight: got 4 rows, expected at least 5"),
    ({"token_type_weight": torch.randn(0, 4)}, "token_type_weight: got 0 rows, expected at least 1"),
    ({"positions": torch.zeros(5).long()}, "positions: got a tensor without position_weight"),
    ({"token_types": torch.zeros(5).long()}, "token_types: got a tensor without token_type_weight"),
    ({"position_weight": torch.randn(9, 4), "positions": torch.zeros(5)}, "positions: got torch.float32"),
    ({"position_weight": torch.randn(9, 4), "positions": torch.zeros(4).long()}, r"positions: got shape \(4,\)"),
    ({"token_type_weight": torch.randn(2, 4), "token_types": torch.zeros(1, 2, 5).long()}, "that broadcasts"),
)


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_errors_are_clear(change: dict[str, Any], says: str) -> None:
    call = {"input": torch.zeros(2, 5).long(), "weight": torch.randn(6, 4), **change}
    with pytest.raises(ValueError, match=says):
        LF.fused_embedding(**call)


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_positions_out_of_range(backend: str, bad: int) -> None:
    for name in ("positions", "token_types"):
        table = torch.randn(9, 300)
        rows = torch.randint(9, (200,))
        rows[150] = bad
        keywords = {name: rows, "position_weight" if name == "positions" else "token_type_weight": table}
        with pytest.raises(IndexError, match="index out of range in self") as error:
            LF.fused_embedding(torch.zeros(200).long(), torch.randn(3, 300), **keywords)
        assert backend not in ("native", "triton") or str(error.value).startswith(f"{name}: ")


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", kernels(OP))
def test_the_op_checks_what_memory_safety_needs(kernel: str) -> None:
    """The functional never passes such arguments down; a caller of the op may."""
    forward, backward = (getattr(torch.ops.llmkern, f"fused_embedding_{phase}") for phase in ("forward", "backward"))
    weight, none, options = torch.randn(6, 4), (None,) * 4, (1.0, "none", 1e-5, 0.0, 0, -1, False)
    stats, wants = torch.empty(0, 2), 1
    at = torch.tensor([0, 5, 1])
    for bad in (-1, 6, 2**40):
        wrong = torch.tensor([0, bad, 1])
        with pytest.raises(IndexError, match="index out of range in self"):
            backward(torch.randn(3, 4), weight, *none, wrong, None, None, stats, *options, wants, kernel)
    with pytest.raises(ValueError, match="dout: expected"):
        backward(torch.randn(2, 4), weight, *none, at, None, None, stats, *options, wants, kernel)
    normed = (1.0, "layer", 1e-5, 0.0, 0, -1, False)
    with pytest.raises(ValueError, match="stats: expected"):
        backward(torch.randn(3, 4), weight, *none, at, None, None, stats, *normed, wants, kernel)
    with pytest.raises(ValueError, match="contiguous"):
        forward(torch.randn(4, 6).t(), *none, at, None, None, *options, kernel)
    with pytest.raises(ValueError, match="of which N is a multiple"):
        forward(weight, weight, None, None, None, at, at[:2], None, *options, kernel)
    with pytest.raises(ValueError, match="expected a table and its indices"):
        forward(weight, weight, None, None, None, at, None, None, *options, kernel)
    with pytest.raises(ValueError, match=r"norm_bias: expected \(D\)"):
        forward(weight, None, None, None, torch.ones(3), at, None, None, *options, kernel)
    with pytest.raises(ValueError, match="expected norm none, layer or rms"):
        forward(weight, *none, at, None, None, 1.0, "batch", *options[2:], kernel)


def test_module(backend: str) -> None:
    torch.manual_seed(3)
    module = lnn.FusedEmbedding(11, 8, -1, num_positions=6, num_token_types=2, norm="layer", dropout=0.25, scale=2.0)
    torch.manual_seed(3)
    words, positions, types = (torch.nn.Embedding(n, 8) for n in (11, 6, 2))
    assert torch.equal(module.weight[:-1], words.weight[:-1])
    assert not module.weight[-1].any()
    assert torch.equal(module.position_weight, positions.weight)
    assert torch.equal(module.token_type_weight, types.weight)
    assert repr(module) == (
        "FusedEmbedding(11, 8, padding_idx=10, num_positions=6, num_token_types=2, scale=2.0, norm='layer',"
        " dropout=0.25)"
    )
    assert list(module.state_dict()) == ["weight", "position_weight", "token_type_weight", "norm_weight", "norm_bias"]
    input = torch.randint(11, (3, 6))
    assert 0.1 < (module(input) == 0).double().mean() < 0.4
    module.eval()
    expected = module(input)
    torch.testing.assert_close(
        expected,
        F.layer_norm(2 * module.weight[input] + module.position_weight + module.token_type_weight[0], (8,)),
    )
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(input), expected)
    fresh = lnn.FusedEmbedding(11, 8, num_positions=6, num_token_types=2, norm="layer", scale=2.0)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(input), expected)
    at = torch.tensor([5, 4, 3, 2, 1, 0])
    assert torch.equal(module(input.flip(1), at).flip(1), expected)
    assert not torch.equal(module(input, token_types=torch.ones(1).long()), expected)
    plain = lnn.FusedEmbedding(11, 8, norm="rms", elementwise_affine=False)
    assert [name for name, _ in plain.named_parameters()] == ["weight"]
    assert [n for n, _ in lnn.FusedEmbedding(11, 8, norm="rms").named_parameters()] == ["weight", "norm_weight"]
    assert repr(lnn.FusedEmbedding(3, 4)) == "FusedEmbedding(3, 4)"
    for wrong in ({"padding_idx": 11}, {"padding_idx": -12}, {"norm": "batch"}):
        with pytest.raises(ValueError, match="expected"):
            lnn.FusedEmbedding(11, 8, **wrong)


def test_explain_says_what_ran() -> None:
    module = lnn.FusedEmbedding(11, 512, num_positions=64, norm="layer", dropout=0.1)
    for tokens, dropout, backend in ((64, 0.1, "native"), (8, 0.1, "torch"), (64, 0.0, "torch"), (128, 0.0, "native")):
        module.dropout = dropout
        explanation = llmkern.explain(module, torch.zeros(tokens // 8, 8).long())
        assert explanation.choices[0].op == OP
        assert explanation.backends == ((backend,) if NATIVE else ("torch",))
        assert backend == "native" or not NATIVE or "too small to gain" in str(explanation)
    assert set(dir(LF)) >= {OP}
