"""Embedding bags: options, errors, and what must not depend on threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING
from test_embedding_bag import INDICES, KERNELS, MODES, OFFSETS, run
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn

OP = "embedding_bag"


def test_max_goes_to_the_first_of_equal_rows(backend: str, device: torch.device) -> None:
    weight = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 2.0]], device=device)
    indices, offsets = torch.tensor([0, 2, 1, 2], device=device), torch.tensor([0], device=device)
    _, dweight = run(
        lambda w: LF.embedding_bag(indices, w, offsets, mode="max"),
        weight,
        None,
        torch.ones(1, 2, device=device),
    )
    assert dweight.tolist() == [[0, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize("mode", MODES)
def test_compiled_bags_of_any_size(mode: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(LF.embedding_bag, fullgraph=True, backend="aot_eager", dynamic=True)
    indices, offsets = torch.tensor([0, 2, 1, 3, 2, 2]), torch.tensor([0, 1, 4, 6])
    weight, dout, samples = torch.randn(5, 2), torch.randn(3, 2), torch.randn(6) if mode == "sum" else None

    def call(f: Any, w: Tensor, s: Tensor | None = None) -> Tensor:
        if mode == "mean":
            return f(indices.view(3, 2), w, padding_idx=2)
        return f(indices, w, offsets, mode=mode, per_sample_weights=s, include_last_offset=True)

    ours, theirs = (run(partial(call, f), weight, samples, dout) for f in (compiled, F.embedding_bag))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_frequency_divides_by_the_right_count(backend: str, mode: str) -> None:
    """torch's CPU gradient takes the count of another row."""
    if backend == "torch":
        pytest.skip("torch's own")
    weight, dout = torch.randn(6, 4, dtype=torch.double), torch.randn(6, 4, dtype=torch.double)
    ours = run(
        lambda w: LF.embedding_bag(INDICES, w, OFFSETS, mode=mode, scale_grad_by_freq=True),
        weight,
        None,
        dout,
    )
    plain = run(lambda w: LF.embedding_bag(INDICES, w, OFFSETS, mode=mode), weight, None, dout)
    counts = INDICES.bincount(minlength=6).clamp(min=1)[:, None]
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1] / counts)


@pytest.mark.parametrize(("mode", "last"), [("sum", False), ("mean", False), ("sum", True)])
def test_derivatives_by_frequency(backend: str, device: torch.device, mode: str, last: bool) -> None:
    """The backward is no derivative of the forward, but has its own; what lies behind the last offset has no part."""
    if backend == "torch":
        pytest.skip("torch has none")
    weight = torch.randn(6, 3, dtype=torch.double, device=device, requires_grad=True)
    samples = torch.randn(8, dtype=torch.double, device=device, requires_grad=True)
    offsets = torch.tensor([0, 2, 5]) if last else OFFSETS
    dout = torch.randn(len(offsets) - last, 3, dtype=torch.double, device=device, requires_grad=True)

    def pullback(dout: Tensor, samples: Tensor) -> Tensor:
        out = LF.embedding_bag(
            *(INDICES.to(device), weight, offsets.to(device)),
            mode=mode,
            per_sample_weights=samples,
            scale_grad_by_freq=True,
            include_last_offset=last,
        )
        return torch.autograd.grad(out, weight, dout, create_graph=True)[0]

    assert gradcheck(pullback, (dout, samples), fast_mode=INTERPRETING)
    assert gradgradcheck(pullback, (dout, samples), fast_mode=INTERPRETING)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_bags_about_the_size_of_a_block(kernel: str, mode: str) -> None:
    """Rows and columns; whole numbers, and few of them: sums are exact, and a max has many equals."""
    lengths = torch.tensor([0, 7, 8, 9, 1, 15, 16, 17, 40, 0])
    offsets, N = lengths.cumsum(0) - lengths, int(lengths.sum())
    for D in (127, 128, 129, 260):
        weight, dout = torch.randint(-2, 3, (12, D)).double(), torch.randint(-2, 3, (10, D)).double()
        indices = torch.randint(12, (N,))
        for padding_idx in (None, 2):
            with llmkern.backend(kernel):
                ours, theirs = (
                    run(
                        lambda w, f=f, p=padding_idx, i=indices: f(i, w, offsets, mode=mode, padding_idx=p),
                        *(weight, None, dout),
                    )
                    for f in (LF.embedding_bag, F.embedding_bag)
                )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_decreasing_offsets(kernel: str) -> None:
    weight = torch.randn(6, 4)
    for bad, place in (([0, 4, 2], 2), ([0, 5, 5, 4], 3)):
        # The CPU's says by how much, too.
        text = rf"offsets must not decrease, but offsets\[{place}\] (= [24] follows [45]|does); each says where"
        for mode in MODES:
            with llmkern.backend(kernel), pytest.raises(ValueError, match=text):
                LF.embedding_bag(INDICES, weight, torch.tensor(bad), mode=mode)
        with llmkern.backend(kernel), pytest.raises(ValueError, match="offsets must not decrease"):
            lnn.EmbeddingBag(6, 4)(INDICES, torch.tensor(bad))


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "change",
    [
        {"offsets": None},
        {"offsets": torch.tensor([1, 2])},
        {"offsets": torch.tensor([0, 9])},
        {"offsets": torch.zeros(1, 1, dtype=torch.int64)},
        {"offsets": torch.zeros(0, dtype=torch.int64), "include_last_offset": True},
        {"input": INDICES.reshape(2, 4)},
        {"input": INDICES.reshape(2, 2, 2)},
        {"input": INDICES.float()},
        {"weight": torch.randn(6)},
        {"mode": "median"},
        {"mode": "max", "scale_grad_by_freq": True},
        {"mode": "max", "sparse": True},
        {"mode": "max", "per_sample_weights": torch.ones(8)},
        {"mode": "sum", "sparse": True, "scale_grad_by_freq": True},
        {"mode": "sum", "per_sample_weights": torch.ones(7)},
        {"mode": "sum", "per_sample_weights": torch.ones(8).double()},
        {"padding_idx": 6},
    ],
    ids=repr,
)
def test_errors_are_torchs(change: dict[str, Any], kernel: str) -> None:
    call = {"input": INDICES, "weight": torch.randn(6, 4, requires_grad=True), "offsets": OFFSETS, **change}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.embedding_bag(**call).sum().backward()
    with llmkern.backend(kernel), pytest.raises(theirs.type) as ours:
        LF.embedding_bag(**call).sum().backward()
    assert str(ours.value) == str(theirs.value)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [-1, 6, 2**40])
@pytest.mark.parametrize("mode", MODES)
def test_index_out_of_range(mode: str, bad: int, kernel: str) -> None:
    """torch has several texts for it, by mode and dtype: on the CPU it is asked. Nothing is changed."""
    N = 100 if INTERPRETING else 5000
    for dtype in FLOATS[1::2] if INTERPRETING else FLOATS:
        for place in (0, N * 3 // 5, N - 1):
            table = torch.randn(6, 9).to(dtype).mul_(10)
            weight, indices = table.clone().requires_grad_(), torch.randint(6, (N,))
            indices[place] = bad
            with llmkern.backend(kernel):
                for input in (indices, indices.view(-1, 50)):
                    offsets = torch.arange(0, N, 7) if input.dim() == 1 else None
                    with pytest.raises(RuntimeError) as theirs:
                        F.embedding_bag(input, weight, offsets, mode=mode)
                    with pytest.raises(RuntimeError) as ours:
                        LF.embedding_bag(input, weight, offsets, mode=mode)
                    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
                with pytest.raises((IndexError, RuntimeError)):
                    LF.embedding_bag(indices.view(-1, 100), weight, mode=mode, max_norm=0.1)
            assert torch.equal(weight, table)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm(backend: str, norm_type: float) -> None:
    table, dout = torch.randn(6, 4), torch.randn(6, 4)
    results = []
    for function in (LF.embedding_bag, F.embedding_bag):
        weight = table.clone().requires_grad_()
        out = function(INDICES, weight, OFFSETS, max_norm=1.0, norm_type=norm_type)
        out.backward(dout)
        results.append((out, weight, weight.grad))
        assert weight._version == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sparse_gradients(mode: str, kernel: str) -> None:
    for dtype in FLOATS:
        for samples in (None, torch.randn(8).to(dtype).requires_grad_()):
            for padding_idx in (None, 1):
                table, dout = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
                results = []
                for sparse in (True, False):
                    weight = table.clone().requires_grad_()
                    with llmkern.backend(kernel):
                        out = LF.embedding_bag(
                            *(INDICES, weight, OFFSETS, None, 2, False, mode, sparse, samples, False, padding_idx)
                        )
                    leaves = [weight] if samples is None else [weight, samples]
                    results.append([out, *torch.autograd.grad(out, leaves, dout)])
                rows = results[0][1]
                assert rows.is_sparse
                assert rows.is_coalesced()
                assert rows.indices().tolist() == [[r for r in (0, 1, 2, 4, 5) if r != padding_idx]]
                results[0][1] = rows.to_dense()
                assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_sparse_gradients_can_be_differentiated(kernel: str) -> None:
    weight = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    samples = torch.randn(8, dtype=torch.double, requires_grad=True)
    dout = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    for padding_idx in (None, 1):

        def pullback(dout: Tensor, samples: Tensor, padding_idx: int | None = padding_idx) -> Tensor:
            with llmkern.backend(kernel):
                out = LF.embedding_bag(
                    *(INDICES, weight, OFFSETS, None, 2, False, "mean", True, samples, False, padding_idx)
                )
            return torch.autograd.grad(out, weight, dout, create_graph=True)[0].to_dense()

        assert gradcheck(pullback, (dout, samples), fast_mode=INTERPRETING)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_table_may_change_before_the_backward(kernel: str) -> None:
    weight = torch.randn(6, 4, requires_grad=True)
    for mode in MODES:
        with llmkern.backend(kernel):
            out = LF.embedding_bag(INDICES, weight, OFFSETS, mode=mode)
        expected = torch.autograd.grad(out.sum(), weight, retain_graph=True)[0]
        with torch.no_grad():
            weight.mul_(-1)
        assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], expected)


@pytest.mark.kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by_freq", [False, True])
def test_what_lies_behind_the_last_bag_does_not_count(mode: str, by_freq: bool) -> None:
    """torch's sums do the same; its means and maxes count it."""
    if by_freq and mode == "max":
        pytest.skip("torch has none")
    weight, dout, offsets = torch.randn(6, 4).double(), torch.randn(2, 4).double(), torch.tensor([0, 2, 5])

    def bags(indices: Tensor, samples: Tensor | None) -> list[Tensor]:
        def call(weight: Tensor, samples: Tensor | None = None) -> Tensor:
            return LF.embedding_bag(
                *(indices, weight, offsets, None, 2, by_freq, mode, False, samples), include_last_offset=True
            )

        return run(call, weight, samples, dout)

    for name in (*KERNELS, "reference"):
        for samples in (None, torch.randn(8).double())[: 1 + (mode != "max")]:
            with llmkern.backend(name):
                whole, part = bags(INDICES, samples), bags(INDICES[:5], None if samples is None else samples[:5])
            if samples is not None:
                assert not whole[2][5:].any()
                whole[2] = whole[2][:5]
            for a, b in zip(whole, part, strict=True):
                torch.testing.assert_close(a, b)


def test_a_max_takes_nan_as_torch_does(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[nan, 1.0], [2.0, nan], [3.0, 0.0], [-inf, -inf]])
    # The long ones are several blocks of rows.
    for bag in ([0, 1, 2], [2, 1, 0], [1, 0], [3], [3, 3], [3, 0], [0, 3], [2] * 64 + [0, 1], [0] + [3] * 64):
        both = [
            run(lambda w, f=f, bag=bag: f(torch.tensor([bag]), w, mode="max"), weight, None, torch.ones(1, 2))
            for f in (LF.embedding_bag, F.embedding_bag)
        ]
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.skipif("native" not in KERNELS, reason="needs the native library")
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(mode: str) -> None:
    """Hot rows, long bags and short ones."""
    threads = torch.get_num_threads()
    lengths = torch.cat([torch.tensor([5000, 0, 3000]), torch.randint(40, (600,))])
    N = int(lengths.sum())
    weight, dout = torch.randn(3000, 33), torch.randn(len(lengths), 33)
    indices, offsets = (torch.rand(N).pow(4) * 3000).long(), lengths.cumsum(0) - lengths
    samples = None if mode == "max" else torch.randn(N)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with llmkern.backend("native"):
                results.append(
                    run(
                        lambda w, s=None: LF.embedding_bag(indices, w, offsets, mode=mode, per_sample_weights=s),
                        *(weight, samples, dout),
                    )
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
