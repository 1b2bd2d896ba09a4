"""Squared error: (x - t)^2, summed or not, and its gradient 2 * (x - t) * g.

Traffic. Sum: reads 2N. Elementwise: reads 2N, writes N. Backward: reads 2N (3N with elementwise g), writes N for each
gradient that is wanted. The sum writes the gradients in its own pass, which saves the 2N that a backward would read
again, for the gradient that the sum will most likely get. If another comes, a kernel that finds it out corrects them.

A program takes one block, sixteen elements a thread, so that eight loads of 16 bytes are in flight. The sum of a
block is one partial in fp32 (fp64 for fp64); one program adds the partials in order, in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load, sum_partials
from ._launch import acc_type, accumulator, ceil_div, launch

BLOCK = 4096


@triton.jit
def _difference(input_ptr, target_ptr, i, mask, ACC: tl.constexpr):
    return load(input_ptr, i, mask).to(ACC) - load(target_ptr, i, mask).to(ACC)


@triton.jit
def _store_gradients(dinput_ptr, dtarget_ptr, gradient, i, mask):
    if dinput_ptr is not None:
        tl.store(dinput_ptr + i, gradient.to(dinput_ptr.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        tl.store(dtarget_ptr + i, (-gradient).to(dtarget_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_block(
    input_ptr, target_ptr, scale_ptr, dinput_ptr, dtarget_ptr, partials_ptr, block, i, mask, ACC: tl.constexpr
):  # fmt: skip
    d = _difference(input_ptr, target_ptr, i, mask, ACC)
    tl.store(partials_ptr + block, tl.sum(d * d, 0))
    if scale_ptr is not None:
        _store_gradients(dinput_ptr, dtarget_ptr, d * (2.0 * tl.load(scale_ptr)), i, mask)


@triton.jit(do_not_specialize=["n"])
def mse_loss_forward_sum_kernel(
    input_ptr, target_ptr, scale_ptr, dinput_ptr, dtarget_ptr, partials_ptr, n: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= n:
        _sum_block(input_ptr, target_ptr, scale_ptr, dinput_ptr, dtarget_ptr, partials_ptr, block, i, None, ACC)
    else:
        _sum_block(input_ptr, target_ptr, scale_ptr, dinput_ptr, dtarget_ptr, partials_ptr, block, i, i < n, ACC)


@triton.jit(do_not_specialize=["count"])
def mse_loss_total_kernel(partials_ptr, total_ptr, count: tl.int64, BLOCK: tl.constexpr):
    total = sum_partials(partials_ptr, count, BLOCK)
    tl.store(total_ptr, total.to(total_ptr.dtype.element_ty))


@triton.jit
def _square_block(input_ptr, target_ptr, out_ptr, i, mask, ACC: tl.constexpr):
    d = _difference(input_ptr, target_ptr, i, mask, ACC)
    tl.store(out_ptr + i, (d * d).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def mse_loss_forward_kernel(
    input_ptr, target_ptr, out_ptr, n: tl.int64, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= n:
        _square_block(input_ptr, target_ptr, out_ptr, i, None, ACC)
    else:
        _square_block(input_ptr, target_ptr, out_ptr, i, i < n, ACC)


@triton.jit
def _gradient_block(
    dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, i, mask, REDUCE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    twice = 2.0 * (tl.load(dloss_ptr) if REDUCE else load(dloss_ptr, i, mask)).to(ACC)
    d = _difference(input_ptr, target_ptr, i, mask, ACC)
    _store_gradients(dinput_ptr, dtarget_ptr, d * twice, i, mask)


@triton.jit(do_not_specialize=["n"])
def mse_loss_correct_kernel(
    dloss_ptr, scale_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, n: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The backward of the sum, unless it was done for what came."""
    if tl.load(dloss_ptr) != tl.load(scale_ptr):
        block = tl.program_id(0).to(tl.int64)
        i = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= n:
            _gradient_block(dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, i, None, True, ACC)
        else:
            _gradient_block(dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, i, i < n, True, ACC)


@triton.jit(do_not_specialize=["n"])
def mse_loss_backward_kernel(
    dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, n: tl.int64,
    REDUCE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= n:
        _gradient_block(dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, i, None, REDUCE, ACC)
    else:
        _gradient_block(dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, i, i < n, REDUCE, ACC)


def _check(input: Tensor, target: Tensor, sums: dict[str, Tensor]) -> None:
    if not (input.is_contiguous() and target.is_contiguous()):
        raise ValueError("mse_loss: expected contiguous tensors")
    if input.shape != target.shape or input.dtype != target.dtype:
        raise ValueError("mse_loss: expected input and target of one shape and dtype")
    for name, value in sums.items():
        if value.numel() != 1 or value.dtype != accumulator(input):
            raise ValueError(f"mse_loss: expected {name} (), float32 or, for float64 input, float64")


def _gradient(input: Tensor, wanted: bool) -> Tensor:
    """Of the input's shape, or, if it is not wanted, empty."""
    return input.new_empty(input.shape if wanted else (0,))


def mse_loss_forward(
    input: Tensor, target: Tensor, reduce: bool, scale: Tensor | None, need_input: bool, need_target: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dinput, dtarget): the squared errors, or with ``reduce`` their sum, and if they are needed the gradients
    of ``scale`` times the sum."""
    _check(input, target, {} if scale is None else {"scale": scale})
    if (need_input or need_target) and (scale is None or not reduce):
        raise ValueError("mse_loss: gradients need a sum and its scale")
    n = input.numel()
    blocks, options = ceil_div(n, BLOCK), {"ACC": acc_type(input), "BLOCK": BLOCK, "num_warps": 8}
    dinput, dtarget = _gradient(input, need_input), _gradient(input, need_target)
    if not reduce:
        out = torch.empty_like(input)
        launch(mse_loss_forward_kernel, (blocks,), input, target, out, n, **options)
        return out, dinput, dtarget
    total = input.new_empty((), dtype=accumulator(input))
    partials = input.new_empty(blocks, dtype=accumulator(input))
    launch(
        mse_loss_forward_sum_kernel, (blocks,), input, target, scale if need_input or need_target else None,
        dinput if need_input else None, dtarget if need_target else None, partials, n, **options,
    )  # fmt: skip
    launch(mse_loss_total_kernel, (1,), partials, total, blocks, BLOCK=2048, num_warps=8)
    return total, dinput, dtarget


def mse_loss_backward(
    dloss: Tensor, input: Tensor, target: Tensor, reduce: bool, need_input: bool, need_target: bool
) -> tuple[Tensor, Tensor]:
    """(dinput, dtarget): 2 * (input - target) * dloss and the negative of it; empty if it is not needed. With
    ``reduce`` ``dloss`` is that of the sum."""
    _check(input, target, {"dloss": dloss} if reduce else {})
    if not reduce:
        _check(input, dloss, {})
    dinput, dtarget = _gradient(input, need_input), _gradient(input, need_target)
    if need_input or need_target:
        launch(
            mse_loss_backward_kernel, (ceil_div(input.numel(), BLOCK),), dloss, input, target,
            dinput if need_input else None, dtarget if need_target else None, input.numel(),
            REDUCE=reduce, ACC=acc_type(input), BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return dinput, dtarget


def mse_loss_correct_(
    dloss: Tensor, scale: Tensor, input: Tensor, target: Tensor, dinput: Tensor, dtarget: Tensor
) -> None:
    """Makes gradients that the forward gave for ``scale`` those for ``dloss``, in place, if it is another; empty ones
    stay empty. The GPU looks, and nobody waits for it."""
    _check(input, target, {"dloss": dloss, "scale": scale})
    given = [gradient if gradient.numel() else None for gradient in (dinput, dtarget)]
    if any(gradient is not None for gradient in given):
        launch(
            mse_loss_correct_kernel, (ceil_div(input.numel(), BLOCK),), dloss, scale, input, target, *given,
            input.numel(), ACC=acc_type(input), BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
