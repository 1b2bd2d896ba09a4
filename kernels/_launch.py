"""How kernels are launched: on the device of their tensors, on its current stream, and in one place that can listen.

A launch is ``launch(kernel, grid, *arguments, **constexprs)``. What it adds to Triton's own ``kernel[grid](...)``:

- an empty grid launches nothing;
- the device of the first tensor is made the current one;
- options of the compiler are pinned, not left to a default that changes between versions of Triton;
- under :func:`recording` launches are noted instead of made, so that tensors may lie on the ``meta`` device: this is
  how tests learn, without a GPU, which kernels a call launches, in which configuration and on how large a grid;
- a fault that an earlier kernel found (an index out of range) is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .._facts import accumulate_dtype
from . import _faults, interpreting

if interpreting():
    from . import _interpreter

    _interpreter.install()


class Launch(NamedTuple):
    """One launch: ``arguments`` are the kernel's in order, groups of them tuples, ``constexprs`` by name, and
    ``options`` the compiler's."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


_record: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches of a block instead of making them: nothing is computed."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    fp_fusion: bool = True,
    cooperative: bool = False,
    **constexprs: Any,
) -> None:
    """Launches ``kernel`` on ``grid`` with ``arguments``, the first of which (of a group, its first) is a tensor.

    Args:
        constexprs: constants by name, and groups (NamedTuples) of constants.
        fp_fusion: whether a product and a sum may become one rounding. Off where a result must have given bits.
        cooperative: all programs run at the same time, so that they may wait for one another.
    """
    constexprs = {n: _constants(type(v), v) if isinstance(v, tuple) else v for n, v in constexprs.items()}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    if cooperative:
        options["launch_cooperative_grid"] = True
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, constexprs, options))
        return
    _faults.raise_any()
    if 0 in grid:
        return
    if interpreting():
        kernel[grid](*arguments, **constexprs)
        _faults.raise_any()
        return
    first = arguments[0]
    device = (first[0] if isinstance(first, tuple) else first).device
    if device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constexprs, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constexprs, **options)


@cache
def _constants(kind: type, group: tuple[Any, ...]) -> Any:
    """A group whose members Triton takes for constants."""
    return kind(*map(tl.constexpr, group))


def concurrent() -> bool:
    """Whether programs of a launch may run at the same time: under the interpreter they run one after another."""
    return not interpreting() or _record is not None


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; where there is none (recording, interpreting), those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def accumulator(tensor: Tensor) -> torch.dtype:
    """What sums over this tensor are kept in: fp64 for fp64, else fp32."""
    return accumulate_dtype(tensor.dtype)


def acc_type(tensor: Tensor) -> tl.dtype:
    """:func:`accumulator` as Triton's type, for a kernel's ``ACC``."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def triton_type(tensor: Tensor) -> tl.dtype:
    """The dtype of a tensor as Triton's type."""
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def require_rows(op: str, tensor: Tensor, name: str) -> None:
    """Raises:
    ValueError: unless ``tensor`` has two dimensions and is contiguous."""
    if tensor.dim() != 2:
        raise ValueError(f"{op}: expected {name} of two dimensions, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: expected a contiguous {name}; call .contiguous()")
