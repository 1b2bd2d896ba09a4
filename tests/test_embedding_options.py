"""Embedding lookup: renormalised tables, sparse gradients, large tables, threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING, assert_accurate
from test_embedding import KERNELS, SIZES, run

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch

OP = "embedding"


@pytest.mark.parametrize("norm_type", [0.0, 1.0, 2.0, 3.5, -1.0, float("inf"), -float("inf")])
def test_max_norm_renormalises_in_place(backend: str, norm_type: float) -> None:
    """D: a vector's tail; several vectors. The pad row is scaled, too; a row that is looked up twice is scaled once."""
    for D, dtype in ((5, torch.float32), (75, torch.float64), (75, torch.bfloat16), (75, torch.float16)):
        indices, dout = torch.tensor([[4, 1, 1], [0, 4, 2]]), torch.randn(2, 3, D).to(dtype)
        table = torch.randn(6, D).to(dtype)
        ours, theirs = table.clone().requires_grad_(), table.clone().requires_grad_()
        for function, weight in ((LF.embedding, ours), (F.embedding, theirs)):
            rows = function(indices, weight, max_norm=0.3, norm_type=norm_type, padding_idx=0)
            assert weight._version == 1
            assert torch.equal(rows, weight[indices])
            rows.backward(dout)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert norm_type < 0 or not torch.equal(ours, table)
        assert torch.equal(ours[[3, 5]], table[[3, 5]])


def test_max_norm_of_special_tables(backend: str) -> None:
    """Rows that are not finite, rows that are short enough, a view, no index."""
    inf, nan = float("inf"), float("nan")
    table = torch.tensor([[inf, 1.0], [nan, 5.0], [0.1, 0.2], [3.0, 4.0]])
    for norm_type in (1.0, 2.0, inf):
        for indices in (torch.tensor([0, 1, 2, 3]), torch.zeros(0, dtype=torch.int64)):
            for view in (lambda t: t, lambda t: t.t().contiguous().t()):
                ours, theirs = view(table.clone()), view(table.clone())
                for function, weight in ((LF.embedding, ours), (F.embedding, theirs)):
                    function(indices, weight, max_norm=1.0, norm_type=norm_type)
                torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("norm_type", [0.0, 2.0, 3.0, float("inf"), -float("inf")])
def test_max_norm_of_long_rows(kernel: str, norm_type: float) -> None:
    """More columns than are read at a time; the norm's last element decides."""
    for D in (1023, 1024, 1025, 2500):
        table = torch.rand(3, D, dtype=torch.double) / 8
        table[1, -1] = 7
        table[2, 0] = float("nan")
        limit = 0.9 * float(table[0].norm(norm_type))
        ours, theirs = table.clone(), table.clone()
        indices = torch.tensor([2, 1, 0, 1, 1])
        with llmkern.backend(kernel):
            LF.embedding(indices, ours, max_norm=limit, norm_type=norm_type)
        F.embedding(indices, theirs, max_norm=limit, norm_type=norm_type)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert not torch.equal(ours[0], table[0])


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_rows_and_columns(kernel: str) -> None:
    """One less than a program takes, as many, one more."""
    for D in (1, 127, 128, 129, 511, 512, 513, 640):
        for N in (1, 7, 8, 9, 63, 64, 65):
            weight, indices = torch.randn(5, D), torch.randint(5, (N,))
            with llmkern.backend(kernel):
                assert torch.equal(LF.embedding(indices, weight), weight[indices])


@pytest.mark.kernels
@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_a_bad_index_changes_nothing(bad: int) -> None:
    for name in ("auto", *KERNELS, "reference"):
        for table in (torch.randn(6, 4), torch.randn(4, 6).t()):
            before = table.clone()
            with (
                llmkern.backend(name),
                pytest.raises(IndexError, match=r"index out of range in self|out of range for tensor"),
            ):
                LF.embedding(torch.tensor([0, 1, bad]), table, max_norm=0.1)
            assert torch.equal(table, before)


@pytest.mark.skipif(not INTERPRETING, reason="runs Triton's kernels on the CPU")
@pytest.mark.kernels
def test_a_bad_index_changes_nothing_though_the_host_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where kernels follow before the host knows."""
    from llmkern.kernels import _faults, _launch, embedding

    raise_any = _faults.raise_any
    monkeypatch.setattr(_launch._faults, "raise_any", lambda: None)
    for bad in (-1, 6, 2**40):
        table, indices = torch.full((6, 4), 9.0), torch.tensor([0, 1, bad, 5])
        embedding.embedding_renorm_(table, indices, 0.1, 2.0)
        assert torch.equal(table, torch.full((6, 4), 9.0))
        rows = embedding.embedding_forward(table, indices)
        assert rows.tolist() == [[9.0] * 4, [9.0] * 4, [0.0] * 4, [9.0] * 4]
        with pytest.raises(IndexError, match="index out of range in self"):
            raise_any()
        raise_any()


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sparse_gradients(dtype: torch.dtype, kernel: str) -> None:
    """Coalesced, without padding, and the dense gradient's numbers; long runs, too."""
    for V, D, N in (*SIZES, (3, 33, 1000)):
        weight, indices, dout = torch.randn(V, D).to(dtype), torch.randint(V, (N,)), torch.randn(N, D).to(dtype)
        for padding_idx in (0,) if INTERPRETING and V > 1000 else (None, 0, V - 1):
            with llmkern.backend(kernel):
                dense = run(LF.embedding, indices, weight, dout, padding_idx=padding_idx)[1]
                rows = run(LF.embedding, indices, weight, dout, padding_idx=padding_idx, sparse=True)[1]
            assert rows.is_sparse
            assert rows.is_coalesced()
            expected = sorted(set(indices.tolist()) - {padding_idx})
            assert rows.indices().tolist() == [expected]
            assert torch.equal(rows.values(), dense[expected])
            assert torch.equal(rows.to_dense(), dense)
    with llmkern.backend("reference"), pytest.raises(dispatch.BackendError, match="sparse"):
        LF.embedding(indices, weight, sparse=True)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_sparse_gradients_of_modules(kernel: str) -> None:
    """Accumulated, clipped, stepped and differentiated again, as torch's are."""
    indices, table = torch.tensor([[1, 4], [4, 2]]), torch.randn(6, 3, dtype=torch.double)
    results = []
    for nn in (lnn, torch.nn):
        module = nn.Embedding.from_pretrained(table.clone(), freeze=False, sparse=True, padding_idx=2)
        optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.1)
        with llmkern.backend(kernel):
            for factor in (1, 2):
                (module(indices) ** 2 * factor).sum().backward()
        gradient = module.weight.grad.to_dense()
        optimizer.step()
        with llmkern.backend(kernel):
            (first,) = torch.autograd.grad(module(indices).sin().sum(), module.weight, create_graph=True)
        second = torch.autograd.grad((first.to_dense() ** 3).sum(), module.weight)[0].to_dense()
        results.append((gradient, module.weight, first.to_dense(), second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif("native" not in KERNELS, reason="needs the native library")
def test_large_tables() -> None:
    """What is written past the caches: rows that begin anywhere in a cache line, or all at the start of one."""
    for V, D, N in ((70_000, 131, 34_000), (40_000, 256, 17_000)):
        weight, indices = torch.randn(V, D), (torch.rand(N).pow(3) * V).long()
        dout = torch.randn(N, D)
        with llmkern.backend("native"):
            out, dweight = run(LF.embedding, indices, weight, dout)
        assert torch.equal(out, weight[indices])
        expected = torch.zeros(V, D, dtype=torch.double).index_add_(0, indices, dout.double())
        assert_accurate(dweight, expected)


@pytest.mark.skipif("native" not in KERNELS, reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_thread_count(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    weight, dout = torch.randn(3000, 33).to(dtype), torch.randn(20_000, 33).to(dtype)
    indices = (torch.rand(20_000).pow(4) * 3000).long()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with llmkern.backend("native"):
                results.append(run(LF.embedding, indices, weight, dout))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
