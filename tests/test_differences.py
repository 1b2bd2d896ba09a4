"""Each line of docs/differences.md: what torch does, and what we do on purpose."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from row_tables import Pair
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import llmkern.functional as F
import llmkern.nn as nn

PAGE = Path(__file__).parents[1] / "docs" / "differences.md"
TORCH_CLIPS_SPARSE = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)
chunked = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no chunks")


def test_every_line_has_its_test_and_every_test_its_line() -> None:
    lines = re.split(r"^- ", PAGE.read_text(), flags=re.M)[1:]
    named = [re.findall(r"`(test_\w+)`", line) for line in lines]
    assert all(len(names) == 1 for names in named)
    tests = [name for name in globals() if name.startswith("test_") and not name.startswith("test_every_line")]
    assert sorted(name for names in named for name in names) == sorted(tests)


def _gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    moving = at.clone().requires_grad_()
    function(moving).sum().backward()
    assert moving.grad is not None
    return moving.grad


def test_sparse_gradients_are_coalesced_and_sorted() -> None:
    table, indices = torch.zeros(4, 2), torch.tensor([2, 0, 1, 2])
    table.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f.embedding(indices, table, padding_idx=1, sparse=True).sum(), table)[0] for f in (F, TF)
    )
    assert theirs._indices().tolist() == [[2, 0, 2]]
    assert ours.is_coalesced()
    assert ours.indices().tolist() == [[0, 2]]
    assert ours.values().tolist() == [[1, 1], [2, 2]]
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_do_not_saturate(dtype: torch.dtype) -> None:
    indices = torch.zeros(5000, dtype=torch.int64)
    ours, theirs = (_gradient(lambda w, f=f: f.embedding(indices, w), torch.zeros(3, 2, dtype=dtype)) for f in (F, TF))
    assert ours[0].tolist() == torch.full((2,), 5000.0).to(dtype).tolist()
    assert theirs[0, 0] == {torch.bfloat16: 256, torch.float16: 2048}[dtype]


def test_a_bad_index_leaves_the_table_as_it_was() -> None:
    for f in (F, TF):
        table = torch.full((6, 2), 10.0)
        with pytest.raises(IndexError, match=r"select\(\): index 9 out of range"):
            f.embedding(torch.tensor([5, 9]), table, max_norm=1.0)
        assert bool((table == 10).all()) == (f is F)


def test_means_of_bags_may_be_weighted() -> None:
    table, indices, samples = torch.randn(6, 2), torch.tensor([1, 2, 3, 4]), torch.tensor([0.5, 2.0, -1.0, 3.0])
    arguments: dict[str, Any] = {"offsets": torch.tensor([0, 3]), "mode": "mean", "per_sample_weights": samples}
    with pytest.raises(NotImplementedError, match="per_sample_weights is only supported for mode='sum'"):
        TF.embedding_bag(indices, table, **arguments)
    rows = table[indices] * samples.unsqueeze(1)
    torch.testing.assert_close(F.embedding_bag(indices, table, **arguments), torch.stack([rows[:3].mean(0), rows[3]]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_indices_after_the_last_offset_are_in_no_bag(mode: str) -> None:
    table, offsets = torch.randn(6, 2), torch.tensor([0, 2, 3])
    call: Callable[[Any, Tensor], Tensor]

    def call(f: Any, w: Tensor, count: int = 4) -> Tensor:
        return f.embedding_bag(torch.tensor([1, 2, 3, 4])[:count], w, offsets, mode=mode, include_last_offset=True)

    without = call(TF, table, 3)
    torch.testing.assert_close(call(F, table), without)
    torch.testing.assert_close(_gradient(lambda w: call(F, w), table), _gradient(lambda w: call(TF, w, 3), table))
    if mode == "mean":
        torch.testing.assert_close(call(TF, table)[1], table[3] / 2)


def test_offsets_must_not_decrease() -> None:
    with pytest.raises(ValueError, match=r"offsets must not decrease, but offsets\[2\] = 1 follows 3"):
        F.embedding_bag(torch.tensor([1, 2, 3, 4]), torch.randn(6, 2), torch.tensor([0, 3, 1]), mode="sum")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_have_second_derivatives(mode: str) -> None:
    indices, offsets = torch.tensor([1, 2, 2, 4]), torch.tensor([0, 3])
    table = torch.randn(6, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: F.embedding_bag(indices, w, offsets, mode=mode), table)
    gradient = torch.autograd.grad(
        TF.embedding_bag(indices, table, offsets, mode=mode).square().sum(), table, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="_embedding_bag"):
        gradient[0].sum().backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ignored_rows_may_hold_nan(bad: float, smoothing: float) -> None:
    logits, target = torch.randn(3, 4), torch.tensor([1, -100, 2])
    clean = _gradient(lambda x: TF.cross_entropy(x, target, label_smoothing=smoothing), logits)
    logits[1] = bad
    ours, theirs = (
        _gradient(lambda x, f=f: f.cross_entropy(x, target, label_smoothing=smoothing), logits) for f in (F, TF)
    )
    torch.testing.assert_close(ours, clean)
    assert theirs[1].isnan().all()


def test_z_loss_is_not_weighted_by_class() -> None:
    logits, target, weight = torch.randn(3, 4), torch.tensor([1, 3, 2]), torch.tensor([1.0, 2.0, 5.0, 0.5])
    term = 0.1 * logits.logsumexp(1).square()
    rows = TF.cross_entropy(logits, target, weight, reduction="none") + term
    torch.testing.assert_close(F.cross_entropy(logits, target, weight, z_loss=0.1, reduction="none"), rows)
    ours = F.cross_entropy(logits, target, weight, z_loss=0.1)
    torch.testing.assert_close(ours, rows.sum() / weight[target].sum())
    ligers = TF.cross_entropy(logits, target, weight) + term.mean()
    assert abs(float(ours - ligers)) > 1e-2
    # Without class weights they are one.
    torch.testing.assert_close(
        F.cross_entropy(logits, target, z_loss=0.1), TF.cross_entropy(logits, target) + term.mean()
    )


@chunked
def test_gradients_are_zeros_where_all_rows_are_ignored() -> None:
    x, target = torch.randn(3, 4), torch.full((3,), -100)
    for f, nan in ((F, False), (TF, True)):
        weight = torch.randn(5, 4, requires_grad=True)
        loss = f.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())
        loss.backward()
        assert loss.isnan()
        assert weight.grad is not None
        assert bool(weight.grad.isnan().all() if nan else (weight.grad == 0).all())


@chunked
def test_chunks_know_every_option() -> None:
    x, weight, target = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    arguments: dict[str, Any] = {"label_smoothing": 0.1, "options": options}
    with pytest.warns(UserWarning, match="``options`` ignored"):
        theirs = TF.linear_cross_entropy(x, weight, target, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(F.linear_cross_entropy(x, weight, target, **arguments), theirs)


@chunked
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_chunked_losses_have_second_derivatives(reduction: str) -> None:
    x, weight = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((6, 4), (5, 4)))
    target, options = torch.arange(6) % 5, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)

    def second(f: Any, **keywords: Any) -> Tensor:
        loss = f.linear_cross_entropy(x, weight, target, reduction=reduction, **keywords)
        first = torch.autograd.grad(loss.sum(), weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), weight)[0]

    torch.testing.assert_close(second(F, options=options), second(TF))
    with pytest.raises(RuntimeError, match=r"automatic differentiation|does not require grad"):
        second(TF, options=options)


def test_linear_losses_take_any_batch() -> None:
    x, weight, target = torch.randn(2, 3, 4), torch.randn(5, 4), torch.arange(6).view(2, 3) % 5
    flat = TF.cross_entropy(x.flatten(0, 1) @ weight.t(), target.flatten(), reduction="none")
    torch.testing.assert_close(F.linear_cross_entropy(x, weight, target, reduction="none"), flat.view(2, 3))
    if hasattr(TF, "linear_cross_entropy"):
        with pytest.raises(RuntimeError, match="dimensionality 1 or 2, got 3"):
            TF.linear_cross_entropy(x, weight, target)


def test_dropout_draws_masks_of_its_own() -> None:
    masks = []
    for f in (F, F, TF):
        torch.manual_seed(5)
        masks.append(f.dropout(torch.ones(1000)) != 0)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    torch.manual_seed(5)
    F.dropout(torch.ones(1000))
    assert not torch.equal(F.dropout(torch.ones(1000)) != 0, masks[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_may_be_wider_than_the_input(dtype: torch.dtype) -> None:
    x, h = torch.randn(5, 2, 3).to(dtype), torch.randn(1, 2, 4)
    module = nn.GRU(3, 4).to(dtype)
    final = module(x, h)[1]
    assert final.dtype == torch.float32
    exact = torch.nn.GRU(3, 4).double()
    exact.load_state_dict(module.state_dict())
    torch.testing.assert_close(final.double(), exact(x.double(), h.double())[1], rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError):
        torch.nn.GRU(3, 4).to(dtype)(x, h)


def test_a_packed_lstm_needs_states_of_all_layers() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    h, short = torch.randn(2, 2, 4), torch.randn(1, 2, 4)
    for states, which in (((short, h), 0), ((h, short), 1), ((h[None], h[None]), 0)):
        shape = list(states[which].shape)
        with pytest.raises(RuntimeError, match=re.escape(f"Expected hidden[{which}] size (2, 2, 4), got {shape}")):
            lstm(packed, states)


def test_projections_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.LSTM(3, 4, proj_size=2)(torch.randn(5, 2, 3))[0].sum().backward()


def test_the_same_bits_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    x, target = torch.randn(96, 256), torch.arange(96) * 7 % 500

    def everything() -> list[Tensor]:
        torch.manual_seed(0)
        lstm, loss = nn.LSTM(256, 64), nn.LinearCrossEntropyLoss(64, 500)
        table = torch.nn.Parameter(torch.randn(40, 256))
        inputs = x + F.embedding(target % 40, table)
        loss(lstm(inputs.view(12, 8, 256))[0].flatten(0, 1), target).backward()
        return [p.grad for p in (table, *lstm.parameters(), *loss.parameters()) if p.grad is not None]

    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    assert len(results[0]) == 6
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_storages_of_large_results_cannot_be_resized() -> None:
    x, weight = torch.randn(512, 512), torch.randn(1024, 512)
    storage = F.linear(x, weight).untyped_storage()
    if torch.__version__ < "2.11":
        # It cannot be given memory that is not its own.
        assert storage.resizable()
    else:
        with pytest.raises(RuntimeError, match="Trying to resize storage that is not resizable"):
            storage.resize_(0)
    TF.linear(x, weight).untyped_storage().resize_(0)
    F.linear(x[:4], weight[:8]).untyped_storage().resize_(0)


def test_sparse_gradients_can_be_clipped() -> None:
    for n in (nn, torch.nn):
        table = torch.nn.Embedding(5, 2, sparse=True)
        table(torch.tensor([1, 1, 2])).sum().backward()
        if n is nn:
            assert float(n.utils.clip_grad_norm_(table.parameters(), 1.0)) == pytest.approx(10**0.5)
            assert table.weight.grad is not None
            assert float(table.weight.grad.to_dense().norm()) == pytest.approx(1, rel=1e-4)
        elif torch.__version__ < "2.14":
            with pytest.raises(NotImplementedError, match="linalg_vector_norm"):
                n.utils.clip_grad_norm_(table.parameters(), 1.0)


def _flops(module: torch.nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """Of the forward, and of the backward too."""
    with FlopCounterMode(display=False) as counter:
        out = module(*inputs)
        forward = counter.get_total_flops()
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    return forward, counter.get_total_flops()


def test_a_dense_lstm_counts_flops() -> None:
    x = torch.randn(5, 2, 3)
    assert _flops(nn.LSTM(3, 4), x)[0] == 2 * 5 * 2 * 16 * (3 + 4)
    assert _flops(torch.nn.LSTM(3, 4), x) == (0, 0)


def test_gradients_of_a_linear_loss_count_in_the_forward() -> None:
    x, target, once = torch.randn(6, 8, requires_grad=True), torch.arange(6), 2 * 6 * 8 * 10
    assert _flops(nn.LinearCrossEntropyLoss(8, 10), x, target) == (3 * once, 3 * once)
    composed = torch.nn.Linear(8, 10, bias=False)
    with FlopCounterMode(display=False) as counter:
        TF.cross_entropy(composed(x), target).backward()
    assert counter.get_total_flops() == 3 * once


def test_rows_of_a_linear_loss_count_their_logits_twice() -> None:
    x, target, once = torch.randn(6, 8, requires_grad=True), torch.arange(6), 2 * 6 * 8 * 10
    assert _flops(nn.LinearCrossEntropyLoss(8, 10, reduction="none"), x, target) == (once, 4 * once)


def test_what_calls_no_op_needs_catch_up() -> None:
    pair = Pair()
    x = torch.zeros(1)
    pair.rows.weight.catch_up()
    x.data = pair.rows.weight
    for seed in (3, 4):
        assert torch.equal(x, pair.dense.weight)
        pair.train(seed=seed)
    assert torch.equal(x, pair.dense.weight)


def test_torch_refuses_some_uses_of_row_gradients() -> None:
    pair = Pair()
    for m in (pair.rows, pair.dense):
        m.zero_grad()
        m(torch.tensor([1, 2, 1])).sum().mul(9).backward()
    with pytest.raises(RuntimeError, match="Creating a Parameter from an instance of type RowParameter"):
        torch.nn.Parameter(pair.rows.weight)
    with pytest.raises(NotImplementedError, match="Sparse"):
        torch.nn.utils.clip_grad_value_(pair.rows.parameters(), 1.0)
    clip = torch.nn.utils.clip_grad_norm_
    if not TORCH_CLIPS_SPARSE:
        with pytest.raises(NotImplementedError, match="Sparse"):
            clip(pair.rows.parameters(), 1.0)
        clip = nn.utils.clip_grad_norm_
    norms = clip(pair.rows.parameters(), 1.0), torch.nn.utils.clip_grad_norm_(pair.dense.parameters(), 1.0)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(pair.rows.weight.grad.to_dense(), pair.dense.weight.grad)


def test_metaclasses_derive_from_that_of_our_classes() -> None:
    for base, kind in ((torch.nn.Linear, type), (torch.nn.Linear, type(nn.Linear)), (nn.Linear, type(nn.Linear))):
        made = type("Meta", (kind,), {})("Layer", (base,), {})
        x, layer = torch.randn(2, 3), made(3, 4)
        assert torch.equal(layer(x), TF.linear(x, layer.weight, layer.bias))
    with pytest.raises(TypeError, match="metaclass conflict"):
        type("Meta", (type,), {})("Layer", (nn.Linear,), {})


def test_names_are_patched_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, torchs = torch.randn(2, 3).cfloat(), torch.randn(4, 3).cfloat(), TF.linear
    # What llmkern holds is what it found, a wrapper too; ours may then take its place.
    monkeypatch.setattr(F.linear.__globals__["F"], "linear", lambda *args: torchs(*args) + 1)
    monkeypatch.setattr(TF, "linear", F.linear)
    assert torch.equal(TF.linear(x, w), torchs(x, w) + 1)
    monkeypatch.setattr(F.linear.__globals__["F"], "linear", lambda *args: F.linear(*args))
    with pytest.raises(RecursionError):
        TF.linear(x, w)
