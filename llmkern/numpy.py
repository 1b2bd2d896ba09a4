"""The native kernels on NumPy arrays, without torch: the same core, the same bits.

Arrays are float32, float64 or float16. NumPy has no bfloat16: pass its bits as uint16 arrays and say
``dtype="bfloat16"``. Arithmetic is in fp32, or in fp64 for float64. Nothing here is differentiable; functions
with ``backward`` in their names are the gradients.

Also here: what the machine is and can do (``isa``, ``build_info``, ``peak_flops``, ``peak_bandwidth``), and
the threads of the process's OpenMP runtime, which is torch's own where torch is installed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _openmp

_native = _openmp.load_native()

__all__ = [
    "build_info",
    "embedding_backward",
    "embedding_forward",
    "gemm",
    "isa",
    "num_threads",
    "peak_bandwidth",
    "peak_flops",
    "set_num_threads",
]

Array = NDArray[Any]

_FLOATS = ("float32", "float64", "float16")


def _floating(x: Any, name: str, ndim: int, dtype: str | None) -> Array:
    """`x` as an array of `ndim` dimensions and of a dtype that the kernels know."""
    x = np.asarray(x)
    if dtype not in (None, "bfloat16", *_FLOATS):
        raise ValueError(f"dtype: got {dtype!r}, expected {', '.join(_FLOATS)} or bfloat16")
    if x.dtype == np.uint16 and dtype is None:
        raise ValueError(f'{name}: got uint16; if it holds bfloat16 bits, pass dtype="bfloat16"')
    expected = "uint16" if dtype == "bfloat16" else dtype
    if (x.dtype.name != expected) if expected else (x.dtype.name not in _FLOATS):
        wanted = f"{expected} (for dtype={dtype!r})" if expected else ", ".join(_FLOATS)
        raise ValueError(f"{name}: got dtype {x.dtype}, expected {wanted}; convert it with astype")
    if x.ndim != ndim:
        raise ValueError(f"{name}: got shape {x.shape}, expected {ndim} dimensions")
    return x if x.dtype.isnative and x.flags.aligned else np.array(x, x.dtype.newbyteorder("="))


def _indices(x: Any) -> Array:
    x = np.asarray(x)
    if x.dtype not in (np.int32, np.int64):
        raise ValueError(f"indices: got dtype {x.dtype}, expected int32 or int64; convert it with astype")
    if x.ndim != 1:
        raise ValueError(f"indices: got shape {x.shape}, expected one dimension; use indices.reshape(-1)")
    return np.ascontiguousarray(x)


def _matrix(x: Array) -> Array:
    """A view that the product can read: contiguous rows or contiguous columns; else a copy."""
    usable = any(x.strides[i] == x.itemsize and x.strides[1 - i] >= x.itemsize * x.shape[i] for i in (0, 1))
    return x if usable else np.ascontiguousarray(x)


def _obey_torch() -> None:
    """Where torch is in use, gives this thread torch's number of threads: OpenMP's own is a setting of each thread."""
    torch = sys.modules.get("torch")
    if hasattr(torch, "get_num_threads"):
        torch.get_num_threads()  # type: ignore[union-attr]


def isa() -> str:
    """The instruction set in use: ``baseline``, ``avx2`` or ``avx512``. LLMKERN_CPU_ISA overrides it."""
    return _native.isa()


def build_info() -> dict[str, Any]:
    """``version`` and ``compiler`` of the native build, ``isas`` built, ``isa`` selected."""
    return _native.build_info()


def num_threads() -> int:
    """How many threads the next kernel may use."""
    _obey_torch()
    return _native.num_threads()


def set_num_threads(n: int) -> None:
    """What ``torch.set_num_threads`` does, without torch.

    Raises:
        ValueError: if ``n`` is less than 1.
    """
    _native.set_num_threads(n)


def peak_flops(dtype: str, seconds: float = 0.2) -> float:
    """Measured GF/s of fused multiply-adds (``bfloat16``: of dot products), from registers, on all threads.

    Raises:
        ValueError: if this CPU has no such arithmetic, or ``dtype`` is unknown.
    """
    return _native.peak_flops(dtype, seconds)


def peak_bandwidth(traffic: str, seconds: float = 0.2) -> float:
    """Measured GB/s of memory beyond the caches, on all threads.

    Args:
        traffic: ``"read"``; ``"copy"``, which counts bytes read and bytes written; or ``"stream"``, stores
            that bypass the caches.
        seconds: how long to measure; the best slice counts. Setting up takes as long again.

    Raises:
        ValueError: if ``traffic`` is none of these.
    """
    return _native.peak_bandwidth(traffic, seconds)


def gemm(a: Array, b: Array, out: Array | None = None, *, accumulate: bool = False, dtype: str | None = None) -> Array:
    """``a @ b``, or ``out += a @ b``.

    Args:
        a: (M, K). Transposed views are used as they lie; other strides are copied.
        b: (K, N), of ``a``'s dtype.
        out: (M, N), C-contiguous, of ``a``'s dtype, not overlapping ``a`` or ``b``. Default: a new array.
        accumulate: adds to ``out``. Default: ``False``.
        dtype: ``"bfloat16"`` for arrays of bfloat16 bits. Default: that of the arrays.

    Returns:
        ``out``, (M, N). Sums are taken in fp32 (fp64 for float64); any number of threads gives the same bits.

    Raises:
        ValueError: for shapes or dtypes that do not fit, saying which.
    """
    a, b = _floating(a, "a", 2, dtype), _floating(b, "b", 2, dtype)
    M, K = a.shape
    N = b.shape[1]
    if b.shape[0] != K:
        raise ValueError(f"gemm: got a {a.shape} and b {b.shape}, expected b ({K}, N): a's columns are b's rows")
    if a.dtype != b.dtype:
        raise ValueError(f"gemm: got a {a.dtype} and b {b.dtype}, expected one dtype; convert one with astype")
    if out is None:
        if accumulate:
            raise ValueError("gemm: got accumulate=True and no out, expected an array to add to; pass out")
        out = np.empty((M, N), a.dtype)
    elif not isinstance(out, np.ndarray) or out.shape != (M, N) or out.dtype != a.dtype:
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"gemm: got out {got}, expected {a.dtype} {(M, N)}")
    elif not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise ValueError("gemm: out must be C-contiguous, aligned and writeable; pass such an array, or none")
    elif np.may_share_memory(out, a) or np.may_share_memory(out, b):
        raise ValueError("gemm: out overlaps an operand; pass another array, or none")
    _obey_torch()
    _native.gemm(_matrix(a), _matrix(b), out, accumulate)
    return out


def embedding_forward(weight: Array, indices: Array, *, dtype: str | None = None) -> Array:
    """``weight[indices]``.

    Args:
        weight: (V, D).
        indices: (N), int32 or int64, each in [0, V).
        dtype: ``"bfloat16"`` for an array of bfloat16 bits. Default: that of the array.

    Returns:
        (N, D).

    Raises:
        IndexError: if an index is outside [0, V).
        ValueError: for shapes or dtypes that do not fit, saying which.
    """
    weight, indices = np.ascontiguousarray(_floating(weight, "weight", 2, dtype)), _indices(indices)
    _obey_torch()
    return _native.embedding_forward(weight, indices)


def embedding_backward(
    dout: Array,
    indices: Array,
    num_weights: int,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    *,
    dtype: str | None = None,
) -> Array:
    """The gradient of :func:`embedding_forward`: row r is the sum of ``dout`` over ``indices == r``.

    Args:
        dout: (N, D).
        indices: (N), int32 or int64, each in [0, num_weights).
        num_weights: V, the rows of the table.
        padding_idx: a row that gets no gradient; negative counts from the end. Default: none.
        scale_grad_by_freq: divides each row by its count. Default: ``False``.
        dtype: ``"bfloat16"`` for an array of bfloat16 bits. Default: that of the array.

    Returns:
        (V, D). Sums are taken in fp32 (fp64 for float64), in the order of the batch.

    Raises:
        IndexError: if an index is outside [0, num_weights).
        ValueError: for shapes, dtypes or a ``padding_idx`` that do not fit, saying which.
    """
    dout, indices = np.ascontiguousarray(_floating(dout, "dout", 2, dtype)), _indices(indices)
    if dout.shape[0] != indices.shape[0]:
        raise ValueError(f"embedding_backward: got dout {dout.shape} for {indices.shape[0]} indices")
    if num_weights < 0:
        raise ValueError(f"embedding_backward: got num_weights {num_weights}, expected 0 or more")
    if padding_idx is not None and not -num_weights <= padding_idx < num_weights:
        bounds = f"[{-num_weights}, {num_weights})"
        raise ValueError(f"embedding_backward: got padding_idx {padding_idx}, expected one in {bounds}")
    padding = -1 if padding_idx is None else padding_idx % num_weights
    _obey_torch()
    return _native.embedding_backward(dout, indices, num_weights, padding, scale_grad_by_freq)
