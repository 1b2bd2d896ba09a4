"""The core's matrix product, through its NumPy entry point: every dtype, layout, tail and thread count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from checks import FLOATS, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

lnp = pytest.importorskip("llmkern.numpy")

# Around the tile (14 x 32, 6 x 16, 4 x 8), the block of k (384; bf16: 768) and the pass over k (9216), and shapes that
# take each path: few rows, one row (b used in place), one column, many of everything, nothing.
SIZES = [
    (1, 1, 1),
    (1, 33, 7),
    (1, 96, 50),
    (2, 1000, 300),
    (1000, 1, 300),
    (13, 31, 383),
    (14, 32, 384),
    (15, 33, 385),
    (28, 64, 770),
    (300, 513, 801),
    (270, 70, 500),
    (500, 40, 9300),
    (300, 33, 4000),
    (5, 0, 3),
    (0, 5, 3),
    (3, 4, 0),
]


def as_numpy(x: Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def as_torch(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(x).view(dtype)


def gemm(a: Tensor, b: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    name = "bfloat16" if a.dtype == torch.bfloat16 else None
    result = lnp.gemm(
        as_numpy(a), as_numpy(b), None if out is None else as_numpy(out), accumulate=accumulate, dtype=name
    )
    return as_torch(result, a.dtype)


def assert_product(result: Tensor, expected: Tensor, theirs: Tensor, K: int, scale: float = 0) -> None:
    """The rule of the house; in fp64 the reference rounds as we do, so that its own error counts."""
    ulps = 4 + K**0.5 if result.dtype == torch.float64 else 4
    assert_accurate(result, expected, theirs, ulps, scale)


@pytest.fixture
def threads() -> Iterator[None]:
    before = lnp.num_threads()
    yield
    lnp.set_num_threads(before)


def operands(
    M: int, N: int, K: int, dtype: torch.dtype, a_transposed: bool, b_transposed: bool
) -> tuple[Tensor, Tensor]:
    a = torch.randn((K, M) if a_transposed else (M, K), dtype=torch.float64).to(dtype)
    b = torch.randn((N, K) if b_transposed else (K, N), dtype=torch.float64).to(dtype)
    return a.t() if a_transposed else a, b.t() if b_transposed else b


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, N, K = size
    for a_transposed, b_transposed in itertools.product((False, True), repeat=2):
        a, b = operands(M, N, K, dtype, a_transposed, b_transposed)
        assert_product(gemm(a, b), a.double() @ b.double(), a @ b, K)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_accumulate(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, N, K = size
    a, b = operands(M, N, K, dtype, False, True)
    out = torch.randn(M, N).to(dtype)
    expected = out.double() + a.double() @ b.double()
    theirs = torch.addmm(out, a, b)
    result = gemm(a, b, out, accumulate=True)
    assert result.data_ptr() == out.data_ptr()
    assert_product(out, expected, theirs, K)


@pytest.mark.parametrize("size", [(300, 513, 801), (64, 2000, 128), (1, 4096, 300), (2000, 33, 65)], ids=str)
@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads(size: tuple[int, int, int]) -> None:
    a, b = operands(*size, torch.float32, False, False)
    results = []
    for n in (1, 2, 3, 5):
        lnp.set_num_threads(n)
        results.append(gemm(a, b))
    assert all(torch.equal(r, results[0]) for r in results)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A row's sums are taken in one order, whatever tile it falls into and whatever path the size takes."""
    a, b = operands(700, 65, 801, torch.float32, False, False)
    whole = gemm(a, b)
    for rows in (slice(0, 1), slice(3, 17), slice(100, 390)):
        assert torch.equal(gemm(a[rows].clone(), b), whole[rows])


@pytest.mark.parametrize("size", [(15, 33, 257), (300, 70, 500)], ids=str)
def test_operands_are_read_inside_their_bounds(size: tuple[int, int, int]) -> None:
    """NaN all around the operands and the result: none comes in, none is overwritten."""
    M, N, K = size
    for dtype, a_transposed, b_transposed in itertools.product(FLOATS, (False, True), (False, True)):
        a, b = operands(M, N, K, dtype, a_transposed, b_transposed)

        def framed(x: Tensor) -> Tensor:
            x = x if x.is_contiguous() else x.t()
            frame = torch.full((x.shape[0] + 2, x.shape[1] + 37), torch.nan, dtype=x.dtype)
            inner = frame[1:-1, 5 : 5 + x.shape[1]]
            return inner.copy_(x)

        fa = framed(a).t() if a_transposed else framed(a)
        fb = framed(b).t() if b_transposed else framed(b)
        store = torch.full((M * N + 128,), torch.nan, dtype=dtype)
        gemm(fa, fb, store[64:-64].view(M, N))
        assert torch.equal(store[64:-64].view(M, N), gemm(a, b))
        assert store[:64].isnan().all()
        assert store[-64:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_stay_in_their_row_and_column(dtype: torch.dtype) -> None:
    a, b = operands(20, 40, 33, dtype, False, True)
    a[3, 7] = torch.nan
    b[5, 39] = torch.inf
    result, expected = gemm(a, b), a.double() @ b.double()
    assert result[3].isnan().all()
    keep = torch.arange(20) != 3
    assert_product(result[keep], expected[keep], (a @ b)[keep], 33)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 70),
    N=st.integers(1, 90),
    K=st.integers(0, 900),
    dtype=st.sampled_from(FLOATS),
    layout=st.tuples(st.booleans(), st.booleans()),
)
def test_any_size(M: int, N: int, K: int, dtype: torch.dtype, layout: tuple[bool, bool]) -> None:
    a, b = operands(M, N, K, dtype, *layout)
    # A single sum may cancel to much less than its terms.
    terms = float((a.double().abs() @ b.double().abs()).max()) if M * N else 0
    assert_product(gemm(a, b), a.double() @ b.double(), a @ b, K, terms)


def test_integers_are_exact() -> None:
    """Small integers have exact products and sums: any wrong index shows."""
    a = torch.randint(-8, 9, (129, 400)).double()
    b = torch.randint(-8, 9, (400, 77)).double()
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(gemm(a.to(dtype), b.to(dtype)).double(), a @ b)


def test_strided_operands_are_copied() -> None:
    a, b = torch.randn(40, 60), torch.randn(60, 50)
    expected = lnp.gemm(a[::2, ::3].contiguous().numpy(), b[::3, ::2].contiguous().numpy())
    assert np.array_equal(lnp.gemm(a.numpy()[::2, ::3], b.numpy()[::3, ::2]), expected)
    assert np.array_equal(lnp.gemm(a.numpy()[::-1], b.numpy()), lnp.gemm(a.flip(0).numpy(), b.numpy()))
    row = np.broadcast_to(a.numpy()[:1], (7, 60))
    assert np.array_equal(lnp.gemm(row, b.numpy())[3], lnp.gemm(a.numpy()[:1], b.numpy())[0])


def test_from_many_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    a, b = operands(100, 200, 300, torch.float32, False, False)
    expected = gemm(a, b)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: gemm(a, b), range(16)))
    assert all(torch.equal(r, expected) for r in results)


class TestErrors:
    a, b = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"got a \(3, 4\) and b \(5, 4\), expected b \(4, N\)"):
            lnp.gemm(self.a, self.b.T.copy())
        with pytest.raises(ValueError, match=r"a: got shape \(12,\), expected 2 dimensions"):
            lnp.gemm(self.a.ravel(), self.b)

    def test_dtypes(self) -> None:
        with pytest.raises(ValueError, match="got dtype int64, expected float32, float64, float16"):
            lnp.gemm(self.a.astype(int), self.b)
        with pytest.raises(ValueError, match="got a float32 and b float64, expected one dtype"):
            lnp.gemm(self.a, self.b.astype(np.float64))
        with pytest.raises(ValueError, match='pass dtype="bfloat16"'):
            lnp.gemm(self.a.astype(np.uint16), self.b.astype(np.uint16))
        with pytest.raises(ValueError, match="got dtype float32, expected uint16"):
            lnp.gemm(self.a, self.b, dtype="bfloat16")
        with pytest.raises(ValueError, match="got 'float8', expected"):
            lnp.gemm(self.a, self.b, dtype="float8")

    def test_out(self) -> None:
        with pytest.raises(ValueError, match=r"got out float32 \(5, 3\), expected float32 \(3, 5\)"):
            lnp.gemm(self.a, self.b, np.ones((5, 3), np.float32))
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            lnp.gemm(self.a, self.b, np.ones((5, 3), np.float32).T)
        with pytest.raises(ValueError, match="no out, expected an array to add to"):
            lnp.gemm(self.a, self.b, accumulate=True)
        square = np.ones((4, 4), np.float32)
        with pytest.raises(ValueError, match="out overlaps an operand"):
            lnp.gemm(square, square, square)
        frozen = np.ones((3, 5), np.float32)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            lnp.gemm(self.a, self.b, frozen)
