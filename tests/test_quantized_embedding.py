"""Tables of 8 and 4 bits: the error bound, every backend against the reference, and the module."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import FLOATS, INTERPRETING, kernels
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch, reference

OP = "quantized_embedding"
BACKENDS = [*kernels(OP), "reference"]
# Columns: none, one, odd numbers and tails of a vector, several vectors, halves that end where one does (31, 32).
COLUMNS = (0, 1, 2, 3, 16, 17, 31, 32, 33, 67, 131, 256)


def assert_bound(module: lnn.QuantizedEmbedding, weight: Tensor) -> None:
    """The documented bound: scale / 2, and the rounding of float32 and of the result's dtype."""
    table = module.dequantize()
    assert table.dtype == weight.dtype
    assert table.shape == weight.shape
    if not weight.numel():
        return
    error = (table.double() - weight.double()).abs().amax(1)
    largest = weight.double().abs().amax(1)
    rounding = (2**-22 + torch.finfo(weight.dtype).eps) * largest + torch.finfo(weight.dtype).smallest_normal * 2**-7
    assert (error <= module.scale.double() / 2 + rounding).all(), (error - module.scale.double() / 2 - rounding).max()
    span = (weight.double().amax(1) - module.offset).clamp(min=0)
    assert (module.scale.double() <= span / (2**module.bits - 1) * (1 + 2**-22) + 2**-148).all()
    assert torch.equal(module.offset, weight.amin(1).float())


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_bound(backend: str, bits: int, dtype: torch.dtype) -> None:
    for D in COLUMNS[::2] if INTERPRETING else COLUMNS:
        weight = (torch.randn(23, D, dtype=torch.double) * torch.logspace(-3, 3, 23)[:, None]).to(dtype)
        weight[1] += 100
        with llmkern.backend(backend):
            module = llmkern.quantize_embedding(weight, bits)
            assert_bound(module, weight)
            rows = torch.randint(23, (4, 5), dtype=torch.int32)
            assert torch.equal(module(rows), module.dequantize()[rows.long()])


@pytest.mark.kernels
@settings(max_examples=15 if INTERPRETING else 200, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40),
    dtype=st.sampled_from(FLOATS),
    bits=st.sampled_from([8, 4]),
    backend=st.sampled_from(BACKENDS),
)
@example([0.0, -0.0], torch.float32, 8, BACKENDS[0])
@example([1e-45, 3e-45, 0.0, 1e-43], torch.float32, 4, BACKENDS[0])  # denormal ranges: the scale is rounded up
@example([1e8, 1e8 + 8, 1e8 + 16], torch.float32, 8, BACKENDS[0])  # offsets far larger than the range
@example([-1.7e38, 1.7e38], torch.float32, 8, BACKENDS[0])
@example([1 / 3, 1 / 3], torch.float64, 8, BACKENDS[0])  # a constant that float32 has not
def test_error_bound_for_any_row(values: list[float], dtype: torch.dtype, bits: int, backend: str) -> None:
    row = torch.tensor([values], dtype=torch.double).clamp(-torch.finfo(dtype).max / 4, torch.finfo(dtype).max / 4)
    with llmkern.backend(backend):
        assert_bound(llmkern.quantize_embedding(row.to(dtype), bits), row.to(dtype))


@pytest.mark.kernels
@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs a kernel")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backends_agree(bits: int, dtype: torch.dtype) -> None:
    """On the stored table bit for bit; on what it stands for to the rounding of one operation."""
    for D in COLUMNS:
        weight, results = torch.randn(9 if INTERPRETING else 50, D).to(dtype), []
        weight[7] = 0.7
        for backend in BACKENDS:
            with llmkern.backend(backend):
                results.append((*LF.quantize_rows(weight, bits), llmkern.quantize_embedding(weight, bits).dequantize()))
        for a, b in zip(results[0][:3], results[1][:3], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(results[0][3], results[1][3])


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_around_a_block(backend: str, bits: int) -> None:
    """Rows of one block of bytes, of a byte less or more, and of several; more rows than one program takes."""
    for D in (300, 511, 512, 513, 1023, 1024, 1025, 2047, 2049):
        weight, at = torch.randn(4, D), torch.tensor([3, 0, 0, 2, 1])
        weight[1, -1], weight[2, 0] = 9, -9
        stored = reference.quantize_rows(weight, bits)
        with llmkern.backend(backend):
            for a, b in zip(LF.quantize_rows(weight, bits), stored, strict=True):
                assert torch.equal(a, b)
            got = LF.quantized_embedding(at, *stored, D, bits)
        torch.testing.assert_close(got, reference.quantized_embedding(*stored, at, D, bits, torch.float32))


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_are_exact(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(9, 1).to(dtype).expand(9, 13)
        with llmkern.backend(backend):
            module = llmkern.quantize_embedding(weight, 4)
        assert not module.scale.any()
        assert torch.equal(module.dequantize(), weight)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout(backend: str) -> None:
    """As documented: the halves of a row in the halves of its bytes."""
    weight = torch.tensor([[0.0, 15.0, 3.0, 7.0, 9.0], [-5.0, -5.0, -5.0, 10.0, 2.0]])
    with llmkern.backend(backend):
        data, scale, offset = LF.quantize_rows(weight, 4)
        assert data.tolist() == [[0 | 7 << 4, 15 | 9 << 4, 3], [0 | 15 << 4, 0 | 7 << 4, 0]]
        assert scale.tolist() == [1, 1]
        assert offset.tolist() == [0, -5]
        eight = LF.quantize_rows(weight * 17, 8)
        assert eight[0].tolist() == [[0, 255, 51, 119, 153], [0, 0, 0, 255, 119]]
        out = LF.quantized_embedding(torch.tensor([1]), data, scale, offset, 5, 4, torch.double)
        assert torch.equal(out, weight[1:].double())
        # Without its width a table of 4 bits has an even one.
        assert LF.quantized_embedding(torch.tensor([[1]]), data, scale, offset, bits=4).shape == (1, 1, 6)


def test_same_bits_for_any_thread_count() -> None:
    weight, rows, threads, results = torch.randn(3000, 67), torch.randint(3000, (5000,)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            module = llmkern.quantize_embedding(weight, 4)
            results.append((module.weight, module.scale, module(rows)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named(backend: str, bad: float) -> None:
    for dtype in FLOATS[1:3] if INTERPRETING else FLOATS:
        weight = torch.randn(200, 19).to(dtype)
        weight[117, 18] = weight[150, 0] = bad
        with llmkern.backend(backend), pytest.raises(ValueError, match=r"row 117 holds NaN .*\(2 such rows in all\)"):
            llmkern.quantize_embedding(weight)
    with llmkern.backend(backend), pytest.raises(ValueError, match=r"row 1 .* spans more than float32 can"):
        llmkern.quantize_embedding(torch.tensor([[1.0, 2.0], [-3e38, 3e38]]))


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_index_out_of_range(backend: str) -> None:
    module = llmkern.quantize_embedding(torch.randn(6, 300))
    for dtype in (torch.int64, torch.int32):
        for bad in (-1, 6, -(2**31), 2**31 - 1):
            rows = torch.randint(6, (200,), dtype=dtype)
            rows[150] = bad
            with llmkern.backend(backend), pytest.raises(IndexError, match="index out of range in self"):
                module(rows)
    empty = llmkern.quantize_embedding(torch.randn(0, 5))
    assert empty(torch.zeros(0, 3).long()).shape == (0, 3, 5)
    assert module(torch.zeros(0).int()).shape == (0, 300)
    with pytest.raises(IndexError, match="index out of range in self"):
        empty(torch.zeros(1).long())


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"bits": 2}, "bits: got 2, expected 8 or 4"),
    ({"weight": torch.randn(6, 4)}, "weight: got torch.float32"),
    ({"weight": torch.zeros(6, dtype=torch.uint8)}, r"weight: got torch.uint8 of shape \(6,\)"),
    ({"scale": torch.ones(5)}, r"scale: got torch.float32 of shape \(5,\), expected float32 \(6,\)"),
    ({"offset": torch.ones(6).double()}, "offset: got torch.float64"),
    ({"embedding_dim": 3}, "embedding_dim: got 3, expected 4$"),
    ({"embedding_dim": 6, "bits": 4}, "embedding_dim: got 6, expected 8 or 7"),
    ({"dtype": torch.int64}, "dtype: got torch.int64"),
)


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_errors_are_clear(change: dict[str, Any], says: str) -> None:
    data = torch.zeros(6, 4, dtype=torch.uint8)
    call = {"input": torch.zeros(3).long(), "weight": data, "scale": torch.ones(6), "offset": torch.ones(6), **change}
    with pytest.raises(ValueError, match=says):
        LF.quantized_embedding(**call)


def test_errors_of_quantising() -> None:
    for wrong, says in ((torch.randn(3), "expected a floating table"), (torch.zeros(3, 4).int(), "torch.int32")):
        with pytest.raises(ValueError, match=says):
            llmkern.quantize_embedding(wrong)
    for bits in (2, 16, None):
        with pytest.raises(ValueError, match="expected 8 or 4"):
            llmkern.quantize_embedding(torch.randn(3, 4), bits)
    with pytest.raises(TypeError, match=r"got EmbeddingBag, expected a torch\.nn\.Embedding"):
        llmkern.quantize_embedding(torch.nn.EmbeddingBag(3, 4))
    with pytest.raises(ValueError, match="max_norm"):
        llmkern.quantize_embedding(torch.nn.Embedding(3, 4, max_norm=1.0))
    with pytest.raises(Exception, match="indices") as theirs:
        F.embedding(torch.zeros(3), torch.randn(3, 4))
    with pytest.raises(theirs.type, match="indices"):
        llmkern.quantize_embedding(torch.randn(3, 4))(torch.zeros(3))
    for wrong in ({"bits": 3}, {"padding_idx": 9}):
        with pytest.raises(ValueError, match="expected"):
            lnn.QuantizedEmbedding(5, 4, **wrong)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", kernels(OP))
def test_the_op_checks_what_memory_safety_needs(kernel: str) -> None:
    forward = torch.ops.llmkern.quantized_embedding_forward
    data, row, at = torch.zeros(6, 4, dtype=torch.uint8), torch.ones(6), torch.tensor([0, 5])
    for arguments in (
        (data, row, row, at, 5, 8),
        (data, row, row, at, 9, 4),
        (data, row[:5], row, at, 4, 8),
        (data, row, row.double(), at, 4, 8),
        (data, row, row, at.float(), 4, 8),
        (data.t(), row, row, at, 6, 8),
        (data, row, row, at, 4, 7),
    ):
        with pytest.raises(ValueError, match=r"expected"):
            forward(*arguments, torch.float32, kernel)


@pytest.mark.parametrize("bits", [8, 4])
def test_module(bits: int) -> None:
    embedding = lnn.Embedding(40, 13, padding_idx=-1)
    module = llmkern.quantize_embedding(embedding, bits)
    rows = torch.randint(40, (3, 5))
    expected = module(rows)
    assert not expected.requires_grad
    assert not list(module.parameters())
    assert (module.padding_idx, module.training) == (39, True)
    assert not module(torch.tensor([39])).any()
    assert repr(module) == f"QuantizedEmbedding(40, 13, bits={bits}, padding_idx=39, dtype=torch.float32)"
    assert {name: t.dtype for name, t in module.state_dict().items()} == {
        "weight": torch.uint8,
        "scale": torch.float32,
        "offset": torch.float32,
    }
    fresh, file = lnn.QuantizedEmbedding(40, 13, bits, padding_idx=39), io.BytesIO()
    assert not fresh(rows).any()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(rows), expected)
    # Copies, not views.
    with torch.no_grad():
        embedding.weight.zero_()
    assert torch.equal(module(rows), expected)


def test_dtype_is_that_of_the_results() -> None:
    weight, rows = torch.randn(20, 9), torch.randint(20, (7,))
    module = llmkern.quantize_embedding(weight)
    exact = module(rows)
    stored = {name: t.clone() for name, t in module.state_dict().items()}
    for dtype in (torch.bfloat16, torch.double, torch.float16, torch.float32):
        assert module.to(dtype) is module
        assert module(rows).dtype == module.dtype == dtype
        torch.testing.assert_close(module(rows), exact.to(dtype))
        assert all(torch.equal(t, stored[name]) for name, t in module.state_dict().items())
    model = torch.nn.Sequential(module, torch.nn.Linear(9, 2)).half()
    assert module.dtype == torch.float16
    assert module.scale.dtype == torch.float32
    assert model.float()(rows).shape == (7, 2)
    assert module.to("meta").weight.is_meta
    empty = lnn.QuantizedEmbedding(5, 4, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    assert empty.dtype == torch.bfloat16
    assert not empty.scale.is_meta


def test_compiles_and_explains() -> None:
    torch.compiler.reset()
    module, rows = llmkern.quantize_embedding(torch.randn(20, 9), 4), torch.randint(20, (7,))
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(rows), module(rows))
    explanation = llmkern.explain(module, rows)
    assert explanation.backends == (BACKENDS[0],)
    assert explanation.choices[0].op == OP
    with llmkern.backend("torch"), pytest.raises(dispatch.BackendError, match="torch has no such op"):
        module(rows)


def test_steps_on_record_are_made_before_a_table_is_quantised() -> None:
    """A table with ``row_grad`` steps its rows when they are read."""
    torch.manual_seed(2)
    tables = [lnn.Embedding(30, 9, row_grad=row_grad) for row_grad in (False, "replay")]
    with torch.no_grad():
        tables[1].weight.copy_(tables[0].weight)
    for table in tables:
        optimizer = llmkern.optim.AdamW(table.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            table(torch.tensor([step, 2 * step])).square().sum().backward()
            optimizer.step()
    dense, lazy = (llmkern.quantize_embedding(table) for table in tables)
    torch.testing.assert_close(lazy.dequantize(), dense.dequantize())
    assert torch.equal(lazy.offset, tables[1].weight.detach().amin(1))
