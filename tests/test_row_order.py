"""The order of a batch's rows, and sums over its runs, where runs, chunks, tiles and blocks begin and end."""

from __future__ import annotations

import pytest
import torch
from checks import INTERPRETING, kernels
from torch import Tensor

from llmkern import dispatch

KERNELS = kernels("embedding")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs Triton's kernels on the CPU")


def backward(kernel: str, dout: Tensor, indices: Tensor, V: int, padding_idx: int = -1) -> Tensor:
    return dispatch.load(kernel).embedding_backward(dout, indices, V, padding_idx, False)


def runs(*lengths: int) -> Tensor:
    """A batch of rows 0, 1, ... that occur so often, in any order."""
    indices = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return indices[torch.randperm(len(indices))]


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 127, 128, 129, 255, 256, 257, 640])
def test_runs_of_any_length_anywhere(kernel: str, length: int) -> None:
    """Whole numbers, so that every sum is exact."""
    for before in (0, 1, 5, 63, 127, 128, 200):
        indices = runs(before, length, 3, 0, 140)
        dout = torch.randint(-9, 10, (len(indices), 3)).float()
        expected = torch.zeros(6, 3).index_add_(0, indices, dout)
        assert torch.equal(backward(kernel, dout, indices, 6), expected)
        expected[1] = 0
        assert torch.equal(backward(kernel, dout, indices.int(), 6, 1), expected)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes_about_those_of_tiles(kernel: str, dtype: torch.dtype) -> None:
    """Columns and rows: one less than a tile has, as many, one more; and those of zeros, which are several tiles."""
    for D in (1, 63, 64, 65, 127, 128, 129, 255, 256, 257):
        for N in (15, 16, 17) if D < 127 else (3, 64):
            V = 5 * N + 1
            indices = torch.randint(V, (N,))
            dout = torch.randint(-9, 10, (N, D)).to(dtype)
            expected = torch.zeros(V, D, dtype=dtype).index_add_(0, indices, dout)
            assert torch.equal(backward(kernel, dout, indices, V), expected)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [3, 8, 9, 100, 129, 300])
def test_a_sum_depends_on_its_run_alone(kernel: str, length: int) -> None:
    """Not on what else is in the batch, nor on where the run lies among it."""
    dout = torch.randn(length, 20)
    alone = backward(kernel, dout, torch.zeros(length, dtype=torch.int64), 1)
    assert torch.equal(alone, backward(kernel, dout, torch.zeros(length, dtype=torch.int64), 1))
    for before in (1, 127, 130):
        indices, others = runs(before, length, 2), torch.randn(before + length + 2, 20)
        others[indices == 1] = dout
        assert torch.equal(backward(kernel, others, indices, 3)[1:2], alone)
    if length <= 8:
        in_turn = torch.zeros(20)
        for row in dout:
            in_turn += row
        assert torch.equal(alone[0], in_turn)


@interpreted
@pytest.mark.kernels
@pytest.mark.parametrize("indices", [[], [4], [7], [2, 2, 2], [5, 0, 7, 5, 2, 5, 7, 0]], ids=str)
@pytest.mark.parametrize("padding_idx", [-1, 5])
def test_orders(indices: list[int], padding_idx: int) -> None:
    from llmkern.kernels import _row_order

    batch, V = torch.tensor(indices, dtype=torch.int64), 8
    counted = [i for i in indices if i != padding_idx]
    order = _row_order.order_by_row(batch, V, padding_idx)
    by_row = [n for row in range(V) for n, i in enumerate(indices) if i == row != padding_idx]
    assert order.positions.tolist()[: len(counted)] == by_row
    assert order.group.tolist() == sorted(counted) + [V] * (len(indices) - len(counted))
    assert order.starts.tolist() == [sum(i < row for i in counted) for row in range(V + 1)]
    assert order.rows is None

    order = _row_order.order_distinct(batch, V, padding_idx)
    distinct = sorted(set(counted))
    assert order.positions.tolist()[: len(counted)] == by_row
    assert order.group.tolist()[: len(counted)] == [distinct.index(i) for i in sorted(counted)]
    assert order.rows is not None
    assert order.rows.tolist() == distinct + [V] * (len(indices) - len(distinct))
    assert order.starts.tolist()[: len(distinct)] == [sum(i < row for i in counted) for row in distinct]
    assert order.starts.tolist()[-1] == len(indices)


@interpreted
@pytest.mark.kernels
@pytest.mark.parametrize("N", [1023, 1024, 1025])
def test_orders_of_several_blocks(N: int) -> None:
    from llmkern.kernels import _row_order

    for V in (255, 256, 5000):
        indices = torch.randint(V, (N,))
        by_row, distinct = _row_order.order_by_row(indices, V), _row_order.order_distinct(indices, V)
        counts = indices.bincount(minlength=V)
        assert by_row.starts.diff().equal(counts)
        present = counts.nonzero().flatten()
        assert distinct.rows is not None
        assert distinct.rows[: len(present)].equal(present.int())
        assert distinct.starts.diff()[: len(present)].equal(counts[present])
        for order in (by_row, distinct):
            assert torch.equal(order.positions, indices.sort(stable=True).indices)


@interpreted
@pytest.mark.kernels
def test_sums_of_scaled_and_of_shared_rows() -> None:
    """What bags and optimizers ask for: positions that count for more, and rows that several positions share."""
    from llmkern.kernels import _row_order, _table_gradient

    indices, source = runs(300, 4, 0, 129, 60), torch.randint(50, (493,), dtype=torch.int32)
    values, scale = torch.randint(-9, 10, (50, 33)).float(), torch.randint(-3, 4, (493,)).float()
    order = _row_order.order_by_row(indices, 5)
    got = _table_gradient.table_gradient(values, order, 5, scale, source)
    assert torch.equal(got, torch.zeros(5, 33).index_add_(0, indices, values[source] * scale[:, None]))
    largest = torch.randint(493, (50, 33), dtype=torch.int32)
    got = _table_gradient.table_gradient(values, order, 5, None, source, largest)
    chosen = values[source] * (largest[source] == torch.arange(493)[:, None])
    assert torch.equal(got, torch.zeros(5, 33).index_add_(0, indices, chosen))


@interpreted
@pytest.mark.kernels
def test_a_bad_index_is_reported_and_left_out() -> None:
    from llmkern.kernels import _row_order

    for bad in (-1, 8, 2**40):
        for order in (_row_order.order_by_row, _row_order.order_distinct):
            with pytest.raises(IndexError, match="index out of range in self"):
                order(torch.tensor([3, bad, 1]), 8)
    assert _row_order.order_by_row(torch.tensor([3, 1]), 8).positions.tolist() == [1, 0]


@pytest.mark.skipif(INTERPRETING, reason="launches nothing")
def test_one_binary_serves_batches_of_any_size() -> None:
    """What changes with the batch is specialised by no kernel; and tables past 2^31 elements have enough programs."""
    pytest.importorskip("triton")
    from llmkern.kernels import _launch

    from llmkern import kernels as triton_kernels

    V, D = 1 << 20, 4096

    def launches(N: int) -> list[_launch.Launch]:
        dout = torch.empty(N, D, dtype=torch.bfloat16, device="meta")
        indices = torch.empty(N, dtype=torch.int64, device="meta")
        offsets = torch.empty(N // 5, dtype=torch.int64, device="meta")
        weight = torch.empty(V, D, dtype=torch.bfloat16, device="meta")
        with _launch.recording() as record:
            triton_kernels.embedding_forward(weight, indices)
            triton_kernels.embedding_backward(dout, indices, V, 0, False)
            triton_kernels.embedding_sparse_backward(dout, indices, V, 0)
            triton_kernels.embedding_renorm_(weight, indices, 1.0, 2.0)
            triton_kernels.embedding_bag_forward(weight, None, indices, offsets, N // 5, True, False, 0)
            out, largest = triton_kernels.embedding_bag_max_forward(weight, indices, offsets, N // 5, False, 0)
            triton_kernels.embedding_bag_backward(out, None, indices, offsets, largest, V, False, False, 0, False)
            triton_kernels.embedding_bag_samples_backward(out, weight, indices, offsets, True, False, 0)
        return record

    small, large = launches(1000), launches(1_000_000)
    assert [a.kernel for a in small] == [b.kernel for b in large]
    for a, b in zip(small, large, strict=True):
        assert (a.constexprs, a.options) == (b.constexprs, b.options)
        for parameter, x, y in zip(a.kernel.params, a.arguments, b.arguments, strict=False):
            if isinstance(x, int) and x != y:
                assert parameter.do_not_specialize, f"{a.kernel.__name__}: {parameter.name}"
    for launch in large:
        if launch.kernel.__name__ == "table_gradient_kernel" and len(launch.grid) == 1:
            blocks = launch.constexprs["R"]
            rows, width = blocks.ROWS.value, blocks.BLOCK_D.value
            assert launch.grid[0] % -(-D // width) == 0
            assert launch.grid[0] * rows * width * launch.constexprs["ZEROS"] >= 1_000_000 * D
