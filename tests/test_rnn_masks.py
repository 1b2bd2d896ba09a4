"""Masks and chunks of recurrent layers: what is drawn where, in eager, compiled and traced code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent import build, tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llmkern.nn as nn

CHUNKED = {
    "LSTM": {"zoneout": (0.3, 0.2), "return_cell_states": True},
    "GRU": {"zoneout": 0.4, "batch_first": True},
    "RNN": {"num_layers": 2, "bidirectional": True, "zoneout": 0.3},
    "sLSTM": {"clip": 0.4, "zoneout": 0.3},
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_change_no_number_and_no_mask(name: str, dtype: torch.dtype, packed: bool) -> None:
    module, x = build(name, 5, 18, **CHUNKED[name]).to(dtype), torch.randn(6, 6, 5).to(dtype)
    given, results = pack_padded_sequence(x, torch.tensor([6, 5, 3, 3, 2, 1])) if packed else x, []
    for module.checkpoint_chunks in (1, 2, 4):
        torch.manual_seed(3)
        outputs = tensors(module(given))
        results.append([*outputs, *torch.autograd.grad([t.sum() for t in outputs], list(module.parameters()))])
    for chunked in results[1:]:
        for a, b in zip(chunked, results[0], strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 0.02 * float(b.detach().abs().max())
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0.0)


def test_chunks_are_differentiated_in_every_way() -> None:
    lstm, plain = (build("LSTM", 3, 4, checkpoint_chunks=chunks).double() for chunks in (2, 1))
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lstm(x)[0], x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: lstm(x)[0], x)

    def loss(parameters: dict[str, Tensor], module: Any) -> Tensor:
        return torch.func.functional_call(module, parameters, (x.detach(),))[0].square().sum()

    values = dict(plain.named_parameters())
    got, want = (torch.func.grad(loss)(values, module) for module in (lstm, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", [{"zoneout": 0.5}, {"zoneout": 0.5, "checkpoint_chunks": 2}])
def test_compiled_training_draws_what_eager_training_draws(options: dict[str, Any]) -> None:
    lstm, x = nn.LSTM(3, 8, **options), torch.randn(4, 2, 3)
    results = []
    for layer in (lstm, torch.compile(lstm, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        for _ in range(2):
            y = layer(x)[0]
            results.append([y, *torch.autograd.grad(y.sum(), list(lstm.parameters()))])
    torch.testing.assert_close(results[:2], results[2:])
    assert not torch.equal(results[2][0], results[3][0])


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_training_freezes_no_mask() -> None:
    layers = [
        nn.LSTM(3, 40, 2, dropout=0.5),
        nn.GRU(3, 40, 2, dropout=0.5, variational_dropout=True),
        nn.GRU(3, 40, zoneout=0.5),
        nn.GRU(3, 40, zoneout=0.5, checkpoint_chunks=2),
        nn.RNN(3, 40, weight_dropout=0.5),
    ]
    x, ids = torch.randn(3, 2, 3), torch.randint(9, (4, 5))
    for module, given in [
        *((layer, x) for layer in (*layers, nn.Dropout(0.5))),
        (nn.FusedEmbedding(9, 8, dropout=0.5), ids),
    ]:
        traced = torch.jit.trace(module, given, check_trace=False)
        assert not torch.equal(*(tensors(traced(given))[0] for _ in range(2)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{}, {"checkpoint_chunks": 2}])
def test_zoneout_follows_the_randomness_of_vmap(options: dict[str, Any]) -> None:
    gru, x = build("GRU", 3, 16, zoneout=0.5, **options).double(), torch.randn(3, 4, 2, 3, dtype=torch.float64)

    def losses(x: Tensor, randomness: str) -> Tensor:
        torch.manual_seed(1)
        return torch.func.vmap(lambda x: gru(x)[0].square().sum(), randomness=randomness)(x)

    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        losses(x, "error")
    for randomness, expected in (("same", 1), ("different", 3)):
        repeated = losses(x[:1].expand(3, 4, 2, 3), randomness)
        assert len(repeated.unique()) == expected
        # The backward draws what the forward drew.
        assert torch.autograd.gradcheck(lambda x, how=randomness: losses(x, how), x.requires_grad_(), fast_mode=True)
