"""Cross-entropy from logits: outputs of each row and, if asked for, its gradient, in one pass over the logits.

Traffic: one read and one write of the logits; without a gradient one read. torch makes eight or nine passes. Three
ways:

- A row of up to 16,384 classes is held in registers between its sums and its gradient. Of small rows a program takes
  several; classes that lie apart (N, V, D) are the same block with its strides exchanged.
- A longer one is read twice by one program, the second time from the L2 cache. So no more rows may be under way than
  fit there: programs are as many as the GPU runs at once, and each takes one row after the other. The second pass goes
  backwards, so that what was read last, and is most certainly still there, is read first.
- Of few long rows each is cut into slices, which many programs take (`_softmax_blocks`).

Rows that are ignored are not read, but where they share cache lines with others (D > 1). A target out of range makes
its row an ignored one and is reported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._groups import LossOptions
from . import _faults
from ._launch import accumulator, ceil_div, launch, multiprocessors, next_power_of_2
from ._softmax_blocks import ColumnBlocks
from ._softmax_rows import (
    Cotangents,
    LogitGradients,
    Loss,
    Outputs,
    accumulate,
    across,
    convert_options,
    finish,
    read_again,
    read_logits,
    read_on,
    read_spread,
    read_target,
    start,
    write_gradient,
)


@triton.jit
def _rows_of(item, N, V, D, groups, ROWS: tl.constexpr, APART: tl.constexpr):
    """Of the rows that a program takes: their numbers, where their first logits are, and which exist."""
    place = tl.arange(0, ROWS)
    item += tl.zeros((1,), tl.int64)
    if APART:
        n, d = item // groups, item % groups * ROWS + place
        row, origin, inside = n * D + d, n * V * D + d, d < D
    else:
        row = item * ROWS + place
        origin, inside = row * V, row < N
    return row, origin, inside


@triton.jit
def _read_target_logits(x_ptr, at, counts, options, S):
    """Before the gradient, which may lie where x does, and before the barrier of the sums."""
    z_y = tl.zeros(counts.shape, S.ACC)
    if S.HARD:
        z_y = read_logits(x_ptr, at, counts, options, S, "")
    return z_y


@triton.jit(do_not_specialize=["N", "groups", "ignore_index"])
def cross_entropy_rows_kernel(
    x_ptr, targets, cotangents, outputs, gradients, N, V, D, groups, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    APART: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, S,
):  # fmt: skip
    """BLOCK_R whole rows, in registers."""
    options = convert_options(keep, rest, z_loss, softcap, scale, S.ACC)
    row, origin, inside = _rows_of(tl.program_id(0), N, V, D, groups, BLOCK_R, APART)
    y, counts, w_y = read_target(targets, row, inside, V, ignore_index, S)
    z_y = _read_target_logits(x_ptr, origin + y * D, counts, options, S)
    v = tl.arange(0, BLOCK_V)[None, :]
    at = origin[:, None] + v.to(tl.int64) * D
    fits = inside[:, None] & (v < V)
    # Where rows lie side by side, an ignored one shares its cache lines with others: reading it costs nothing.
    mask = fits if APART else fits & counts[:, None]
    z = read_logits(x_ptr, at, mask, options, S, "evict_first")
    u = read_spread(targets, at, v, mask, options, S)
    state = accumulate(start(BLOCK_R, S.ACC), z, u, v, mask, S)
    factors = finish(state, z_y, w_y, row, counts, inside, options, cotangents, outputs, S)
    if gradients.blocked is not None:
        fits = fits & (v < tl.where(tl.load(gradients.blocked) != 0, 0, V))
    write_gradient(gradients, targets, at, at, v, y, z, u, factors, counts, fits, mask, options, S)


@triton.jit(do_not_specialize=["N", "items", "groups", "ignore_index"])
def cross_entropy_loop_kernel(
    x_ptr, targets, cotangents, outputs, gradients, N, V, D, items, groups, ignore_index,
    keep: tl.float64, rest: tl.float64, z_loss: tl.float64, softcap: tl.float64, scale: tl.float64,
    APART: tl.constexpr, STATES: tl.constexpr, ELEMENTS: tl.constexpr, S,
):  # fmt: skip
    """One item after the other: a row whose states meet at the end, or (APART) STATES rows."""
    GRADIENT: tl.constexpr = (gradients.x is not None) or (gradients.probabilities is not None)
    ROWS: tl.constexpr = STATES if APART else 1
    STEP: tl.constexpr = ELEMENTS if APART else STATES * ELEMENTS
    POLICY: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    options = convert_options(keep, rest, z_loss, softcap, scale, S.ACC)
    places = tl.arange(0, ELEMENTS)[None, :]
    if not APART:
        places += tl.arange(0, STATES)[:, None] * ELEMENTS
    writable = V
    if gradients.blocked is not None:
        writable = tl.where(tl.load(gradients.blocked) != 0, 0, V)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row, origin, inside = _rows_of(item, N, V, D, groups, ROWS, APART)
        y, counts, w_y = read_target(targets, row, inside, V, ignore_index, S)
        z_y = _read_target_logits(x_ptr, origin + y * D, counts, options, S)
        # Where rows lie side by side, an ignored one shares its cache lines with others: reading it costs nothing.
        wanted = (inside if APART else counts)[:, None]
        at = origin[:, None] + places.to(tl.int64) * D
        # The first block apart: sums that start at a constant in a loop are a pattern that Triton 3.6 rewrites wrongly.
        state = start(STATES, S.ACC)
        state = read_on(state, x_ptr, targets, at, at, places, (places < V) & wanted, options, S, POLICY)
        for skip in range(STEP, V, STEP):
            v = places + skip
            at = origin[:, None] + v.to(tl.int64) * D
            state = read_on(state, x_ptr, targets, at, at, v, (v < V) & wanted, options, S, POLICY)
        if not APART:
            state = across(state, 0, S)
        factors = finish(state, z_y, w_y, row, counts, inside, options, cotangents, outputs, S)
        if GRADIENT:
            steps = tl.cdiv(V, STEP)
            for back in range(steps):
                v = (steps - 1 - back) * STEP + places
                at, fits = origin[:, None] + v.to(tl.int64) * D, (v < writable) & inside[:, None]
                mask = (v < V) & wanted
                read_again(x_ptr, gradients, targets, at, at, v, y, factors, counts, fits, mask, options, S)


@triton.jit(do_not_specialize=["N", "V", "ignore_index"])
def cross_entropy_check_kernel(target_ptr, blocked_ptr, fault_ptr, N, V, ignore_index, BLOCK: tl.constexpr):
    """``blocked`` becomes 1 if a target is out of range."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target_ptr + row, mask=row < N, other=0)
    bad = (row < N) & (y != ignore_index) & ((y < 0) | (y >= V))
    _faults.report(bad, y, fault_ptr)
    tl.store(blocked_ptr + tl.zeros_like(row), tl.full((BLOCK,), 1, tl.int32), mask=bad)


def _blocks(V: int, apart: bool, wide: bool, held: bool, heavy: bool) -> tuple[int, int, int] | None:
    """Rows, classes and warps of a block: at most 64 elements a thread, so that two programs fit into the registers
    of a multiprocessor. ``held``: ``u`` is in registers too; ``heavy``: more than the plain loss; ``wide``: fp64. None
    if a row is too long to be held."""
    most = 16384 >> held >> 2 * wide
    classes = max(next_power_of_2(V), 16)
    rows = min(max((4096 >> 2 * wide) // classes, 16 if apart else 1), 64)
    if rows * classes > most:
        return None
    return rows, classes, min(max((rows * classes << heavy << wide) // 2048, 4), 16)


def _loop(row_bytes: int, gradient: bool, heavy: bool) -> tuple[int, int]:
    """Warps, and programs a multiprocessor. With a gradient, half a row of each program waits in the L2 cache for its
    second read, on average; where arithmetic takes longer than that, threads count for more."""
    if row_bytes <= 128 << 10 or not gradient:
        return 8, 4
    if heavy:
        return 8, 2
    return 16, 2 if row_bytes <= 256 << 10 else 1


def _is_split(rows: int, V: int, apart: bool, device: torch.device) -> bool:
    """Whether programs of whole rows would leave half of the GPU or more without work."""
    return not apart and rows <= multiprocessors(device) // 2 and V > 16384


def compute(
    logits: Tensor,
    loss: Loss,
    outputs: Outputs,
    cotangents: Cotangents,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    blocked: Tensor | None = None,
) -> None:
    """Logits (N, V) or (N, V, D), contiguous; what is None is not wanted. ``dlogits`` may be the logits."""
    (N, V), D = logits.shape[:2], logits.shape[2] if logits.dim() == 3 else 1
    apart, rows = D > 1, N * D
    entropy, argmax = outputs.entropy is not None or cotangents.entropy is not None, outputs.argmax is not None
    if _is_split(rows, V, apart, logits.device):
        blocks = ColumnBlocks(loss, logits, N, [V], entropy, argmax)
        blocks.read(logits, 0)
        blocks.combine(cotangents, outputs)
        if dlogits is not None or dtarget is not None:
            blocks.gradient(logits, dlogits, 0, dtarget, blocked)
        return
    loss_options = loss.options
    tensors = (
        *(logits, loss.targets(_faults.word(_faults.TARGET)), cotangents, outputs),
        LogitGradients(dlogits, dtarget, blocked),
    )
    held = loss.soft or (loss_options.label_smoothing != 0 and loss.weight is not None)
    wide = logits.dtype == torch.float64
    heavy = wide or loss.spread or loss_options.softcap != 0 or entropy or argmax
    constants: dict[str, Any] = {"APART": apart, "S": loss.shape(entropy, argmax, logits)}
    if block := _blocks(V, apart, wide, held, heavy):
        BLOCK_R, BLOCK_V, num_warps = block
        groups = ceil_div(D, BLOCK_R)
        grid = (N * groups if apart else ceil_div(N, BLOCK_R),)
        arguments = *tensors, N, V, D, groups, loss_options.ignore_index, *loss.numbers
        constants |= {"BLOCK_R": BLOCK_R, "BLOCK_V": BLOCK_V, "num_warps": num_warps}
        launch(cross_entropy_rows_kernel, grid, *arguments, **constants)
        return
    gradient = dlogits is not None or dtarget is not None
    num_warps, programs = (4, 8) if apart else _loop(V * logits.element_size(), gradient, heavy)
    STATES, ELEMENTS = (64, 32) if apart else ((64 >> heavy) * num_warps, 8)
    groups = ceil_div(D, STATES)
    items = N * groups
    grid = (min(items, programs * multiprocessors(logits.device)),)
    arguments = *tensors, N, V, D, items, groups, loss_options.ignore_index, *loss.numbers
    constants |= {"STATES": STATES, "ELEMENTS": ELEMENTS, "num_warps": num_warps}
    launch(cross_entropy_loop_kernel, grid, *arguments, **constants)


def _check(logits: Tensor, loss: Loss, cotangents: Cotangents) -> None:
    rows = logits.numel() // logits.shape[1]
    if loss.target.numel() != (logits.numel() if loss.soft else rows):
        raise ValueError("cross_entropy: expected a target for every row, or probabilities of the logits' shape")
    for t in cotangents:
        if t is not None and (t.numel() != rows or t.dtype != accumulator(logits)):
            raise ValueError("cross_entropy: expected a cotangent for every row, float32 (float64 for float64)")


def _rows_like(logits: Tensor, entropy: bool, argmax: bool) -> Outputs:
    return Outputs.empty(logits, (logits.shape[0], *logits.shape[2:]), entropy, argmax)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor | None,
    options: LossOptions,
    entropy: bool,
    argmax: bool,
    need_logits: bool,
    need_target: bool,
) -> tuple[Tensor, ...]:
    """loss, lse, entropy and argmax of each row of ``logits`` (N, V) or (N, V, D), and the gradients of the logits and
    of probabilities for ``dloss``; what is not wanted is empty. Everything contiguous."""
    loss = Loss(target, weight, logits.shape[1], options)
    cotangents = Cotangents(dloss)
    _check(logits, loss, cotangents)
    outputs = _rows_like(logits, entropy, argmax)
    dlogits = torch.empty_like(logits) if need_logits else None
    dtarget = torch.empty_like(target) if need_target else None
    compute(logits, loss, outputs, cotangents, dlogits, dtarget)
    return *outputs.filled(), _or_empty(dlogits, logits), _or_empty(dtarget, target)


def cross_entropy_forward_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor,
    options: LossOptions,
    entropy: bool,
    argmax: bool,
    need_target: bool,
) -> tuple[Tensor, ...]:
    """As :func:`cross_entropy_forward`; the gradient takes the place of the logits, unless a target is out of range."""
    loss = Loss(target, weight, logits.shape[1], options)
    cotangents = Cotangents(dloss)
    _check(logits, loss, cotangents)
    outputs = _rows_like(logits, entropy, argmax)
    dtarget = torch.empty_like(target) if need_target else None
    blocked = None
    if not loss.soft:
        blocked = torch.zeros(1, dtype=torch.int32, device=logits.device)
        N, fault = target.numel(), _faults.word(_faults.TARGET)
        arguments = target, blocked, fault, N, loss.V, options.ignore_index
        launch(cross_entropy_check_kernel, (ceil_div(N, 1024),), *arguments, BLOCK=1024)
    compute(logits, loss, outputs, cotangents, logits, dtarget, blocked)
    return *outputs.filled(), _or_empty(dtarget, target)


def cross_entropy_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    need_logits: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the logits and of probabilities; what is not wanted is empty."""
    loss = Loss(target, weight, logits.shape[1], options)
    cotangents = Cotangents(dloss, dlse, dentropy)
    _check(logits, loss, cotangents)
    dlogits = torch.empty_like(logits) if need_logits else None
    dtarget = torch.empty_like(target) if need_target else None
    compute(logits, loss, Outputs(), cotangents, dlogits, dtarget)
    return _or_empty(dlogits, logits), _or_empty(dtarget, target)
