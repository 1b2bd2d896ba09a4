"""`llmkern.numpy`: the kernels on arrays, with and without torch, on one OpenMP runtime, across forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import FLOATS

from llmkern import reference

lnp = pytest.importorskip("llmkern.numpy")

ROOT = Path(__file__).parents[1]
COMPUTE = """
import numpy as np
import llmkern.numpy as lnp
a = np.arange(300 * 400, dtype=np.float32).reshape(300, 400) % 7
assert np.array_equal(lnp.gemm(a, a.T), a @ a.T)
"""
RUNTIMES = """
import os
files = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = {file for file in files if os.path.basename(file).startswith("libgomp")}
"""


def python(code: str, **env: str) -> str:
    """Runs `code` in a fresh interpreter on two threads; a hang is a failure."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", **env},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def name_of(dtype: torch.dtype) -> str | None:
    return "bfloat16" if dtype == torch.bfloat16 else None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_embedding_forward(dtype: torch.dtype, index: torch.dtype) -> None:
    weight = torch.randn(50, 33).to(dtype)
    indices = torch.randint(0, 50, (301,), dtype=index)
    out = lnp.embedding_forward(bits(weight), indices.numpy(), dtype=name_of(dtype))
    assert np.array_equal(out, bits(weight[indices]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_embedding_backward_has_the_ops_bits(
    dtype: torch.dtype, padding_idx: int | None, scale_grad_by_freq: bool
) -> None:
    native = pytest.importorskip("llmkern.native")
    dout = torch.randn(301, 33).to(dtype)
    indices = torch.randint(0, 50, (301,))
    out = lnp.embedding_backward(bits(dout), indices.numpy(), 50, padding_idx, scale_grad_by_freq, dtype=name_of(dtype))
    padding = -1 if padding_idx is None else padding_idx % 50
    expected = native.embedding_backward(dout, indices, 50, padding, scale_grad_by_freq)
    assert np.array_equal(out, bits(expected))


def test_embedding_backward_is_the_gradient() -> None:
    weight = torch.zeros(20, 9, dtype=torch.float64, requires_grad=True)
    indices, dout = torch.randint(0, 20, (77,)), torch.randn(77, 9, dtype=torch.float64)
    reference.embedding(weight, indices, 4, True).backward(dout)
    assert weight.grad is not None
    out = lnp.embedding_backward(dout.numpy(), indices.numpy(), 20, 4, True)
    np.testing.assert_allclose(out, weight.grad.numpy(), rtol=1e-13, atol=1e-14)


def test_empty_arrays() -> None:
    none = np.zeros(0, np.int64)
    assert lnp.embedding_forward(np.ones((5, 3)), none).shape == (0, 3)
    assert np.array_equal(lnp.embedding_backward(np.ones((0, 3)), none, 5), np.zeros((5, 3)))


def test_errors() -> None:
    weight, indices = np.ones((5, 3), np.float32), np.array([0, 4])
    for bad in (5, -1):
        with pytest.raises(IndexError, match="index out of range in self"):
            lnp.embedding_forward(weight, np.array([0, bad]))
        with pytest.raises(IndexError, match="index out of range in self"):
            lnp.embedding_backward(weight[:2], np.array([0, bad]), 5)
    with pytest.raises(ValueError, match="indices: got dtype float64, expected int32 or int64"):
        lnp.embedding_forward(weight, indices.astype(float))
    with pytest.raises(ValueError, match=r"indices: got shape \(1, 2\), expected one dimension"):
        lnp.embedding_forward(weight, indices[None])
    with pytest.raises(ValueError, match=r"weight: got shape \(5,\), expected 2 dimensions"):
        lnp.embedding_forward(weight[:, 0], indices)
    with pytest.raises(ValueError, match=r"got dout \(5, 3\) for 2 indices"):
        lnp.embedding_backward(weight, indices, 5)
    with pytest.raises(ValueError, match=r"got padding_idx 5, expected one in \[-5, 5\)"):
        lnp.embedding_backward(weight[:2], indices, 5, 5)
    with pytest.raises(ValueError, match="got num_weights -1, expected 0 or more"):
        lnp.embedding_backward(weight[:2], indices, -1)


def test_big_endian_arrays_are_converted() -> None:
    a = np.arange(12, dtype=">f4").reshape(3, 4)
    assert np.array_equal(lnp.gemm(a, a.T), a @ a.T)


def test_torch_is_not_needed() -> None:
    python(f"import sys; sys.modules['torch'] = None\n{COMPUTE}")


def test_torch_is_not_imported() -> None:
    assert python("import llmkern, sys; print('torch' in sys.modules)").strip() == "False"
    assert python(COMPUTE + "import sys; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_one_runtime_whoever_comes_first(first: str) -> None:
    both = [COMPUTE, "import torch\ntorch.ones(300, 300) @ torch.ones(300, 300)\n"]
    both = both if first == "numpy" else both[::-1]
    check = "torch.set_num_threads(1); assert lnp.num_threads() == 1; assert len(runtimes) == 1, runtimes\n"
    python("".join(both) + RUNTIMES + check)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("with_torch", [False, True])
def test_a_forked_child_computes(with_torch: bool) -> None:
    torch_too = "import torch; torch.randn(1 << 20).exp().sum()\n" if with_torch else ""
    python(
        torch_too
        + COMPUTE
        + "import os\nb = lnp.gemm(a, a.T)\n"
        + "child = os.fork()\nif child == 0: os._exit(0 if np.array_equal(lnp.gemm(a, a.T), b) else 1)\n"
        + "assert os.waitpid(child, 0)[1] == 0\nassert np.array_equal(lnp.gemm(a, a.T), b)\n"
    )


def test_without_a_runtime_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkern import _openmp

    monkeypatch.setattr(_openmp, "_is_global", lambda: False)
    monkeypatch.setattr(_openmp, "_of_torch", lambda: iter(()))
    monkeypatch.setattr(_openmp, "_SYSTEM", ("libnothing.so",))
    with pytest.raises(ImportError, match=r"needs an OpenMP runtime, and none was found; install one.*libnothing"):
        _openmp.load_openmp()
