"""The length of many tensors taken as one vector, and their scaling: gradient clipping.

Traffic: the gradients are read once for the norm, and read and written once more only if they are scaled.

A launch takes up to eight tensors, whose pointers and sizes are arguments of the kernel: no table of them has to be
copied to the GPU, which would wait for it, or could not be captured in a graph. (Sizes not as a tuple: of what is in a
tuple Triton compiles a version for every pattern of sizes.) A program takes one chunk of one tensor. The norm is summed
in fp64, where no square of a fp32 number overflows or vanishes; each chunk's sum is a partial, and one program adds the
partials in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load, sum_partials
from ._launch import acc_type, ceil_div, launch

# Tensors of a launch, elements of a program, and of a step of it.
TENSORS, CHUNK, BLOCK = 8, 32768, 4096
_CHANGING = [*(f"n{k}" for k in range(TENSORS)), "first"]


@triton.jit
def _own_chunk(tensors, sizes, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """(pointer, begin, end): the elements of one tensor that this program takes."""
    chunk = tl.program_id(0).to(tl.int64)
    ptr, n, first, end = tensors[0], sizes[0], chunk * 0, tl.cdiv(sizes[0], CHUNK)
    for k in tl.static_range(1, len(tensors)):
        ptr = tl.where(chunk >= end, tensors[k], ptr)
        n = tl.where(chunk >= end, sizes[k], n)
        first = tl.where(chunk >= end, end, first)
        end += tl.cdiv(sizes[k], CHUNK)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    begin = (chunk - first) * CHUNK
    return ptr, begin, tl.minimum(begin + CHUNK, n)


@triton.jit
def _squares(ptr, i, mask):
    x = load(ptr, i, mask).to(tl.float64)
    return x * x


@triton.jit(do_not_specialize=_CHANGING)
def grad_norm_kernel(
    tensors,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64, n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    partials_ptr, first: tl.int64, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ptr, begin, end = _own_chunk(tensors, (n0, n1, n2, n3, n4, n5, n6, n7), ALIGNED, CHUNK)
    whole = begin + (end - begin) // BLOCK * BLOCK
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(begin, whole, BLOCK):
        total += _squares(ptr, at + tl.arange(0, BLOCK), None)
    if whole < end:
        i = whole + tl.arange(0, BLOCK)
        total += _squares(ptr, i, i < end)
    tl.store(partials_ptr + first + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def grad_norm_total_kernel(partials_ptr, norm_ptr, count: tl.int64, BLOCK: tl.constexpr):
    tl.store(norm_ptr, tl.sqrt(sum_partials(partials_ptr, count, BLOCK)))


@triton.jit
def _scale_block(ptr, i, mask, factor):
    x = load(ptr, i, mask).to(factor.dtype)
    tl.store(ptr + i, (x * factor).to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_CHANGING)
def grad_norm_scale_kernel(
    tensors,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64, n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    factor_ptr, ACC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ptr, begin, end = _own_chunk(tensors, (n0, n1, n2, n3, n4, n5, n6, n7), ALIGNED, CHUNK)
    whole = begin + (end - begin) // BLOCK * BLOCK
    factor = tl.load(factor_ptr)
    # Gradients that are short enough are not touched.
    if factor != 1.0:
        by = factor.to(ACC)
        for at in range(begin, whole, BLOCK):
            _scale_block(ptr, at + tl.arange(0, BLOCK), None, by)
        if whole < end:
            i = whole + tl.arange(0, BLOCK)
            _scale_block(ptr, i, i < end, by)


class _Group(NamedTuple):
    """What one launch takes: ``arguments``, tensors and sizes as kernels have them, ``chunks`` in all."""

    arguments: tuple[Any, ...]
    chunks: int
    options: dict[str, Any]


def _groups(tensors: list[Tensor]) -> Iterator[_Group]:
    """The tensors that are not empty, in groups of one dtype and alignment. Places left over have size 0."""
    kinds: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError("grad_norm: expected contiguous tensors")
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.data_ptr() % 16 == 0), []).append(tensor)
    for (_, aligned), members in kinds.items():
        options = {"ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": 8}
        for start in range(0, len(members), TENSORS):
            part = members[start : start + TENSORS]
            left = TENSORS - len(part)
            arguments = ((*part, *part[:1] * left), *(t.numel() for t in part), *[0] * left)
            yield _Group(arguments, sum(ceil_div(t.numel(), CHUNK) for t in part), options)


def grad_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of the squares of all elements), a float64 scalar. All contiguous and on one device."""
    if not tensors:
        raise ValueError("grad_norm: expected at least one tensor")
    groups = list(_groups(tensors))
    count, first = sum(group.chunks for group in groups), 0
    norm, partials = (tensors[0].new_empty(shape, dtype=torch.float64) for shape in ((), (count,)))
    for group in groups:
        launch(grad_norm_kernel, (group.chunks,), *group.arguments, partials, first, **group.options)
        first += group.chunks
    launch(grad_norm_total_kernel, (1,), partials, norm, count, BLOCK=2048, num_warps=8)
    return norm


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Each tensor times ``factor``, a float64 scalar beside them, in place: multiplied in fp32 (fp64 for fp64), rounded
    once. If it is 1, nothing is read."""
    for group in _groups(tensors):
        acc = acc_type(group.arguments[0][0])
        launch(grad_norm_scale_kernel, (group.chunks,), *group.arguments, factor, ACC=acc, **group.options)
