"""A recurrent layer as its forward and its backward see it: sizes, checks, and who computes which units when.

Heads of a block diagonal never meet, and neither do sequences: a *chain* is one head of a block of sequences. Its units
are split over programs, which need each other's h of the step before. There are three ways through time:

1. One program has all units of a chain (few units): a barrier among its threads is all.
2. All programs run at the same time and stay for the whole sequence. Each counts its steps in a counter of its chain,
   and begins the next when the others have done as many. No chain waits for another.
3. One launch a step. It needs nothing of its neighbours, and so serves grids of any size.

They are one kernel, which makes steps [first, last). Counters hold no data, so that which program comes first shows in
no bit of the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._facts import CELLS, GATES, saved_gates
from .._groups import RNNInputs, RNNOptions
from . import _launch, _random
from ._launch import accumulator, ceil_div, next_power_of_2
from ._rnn_steps import Numbers, RNNShape, Sizes


class Blocks(NamedTuple):
    """Sequences, units and depth of a program's products, and how it is compiled."""

    rows: int
    units: int
    depth: int
    num_warps: int
    num_stages: int


# Most units of a head that one program takes.
ALONE = {torch.float64: 32, torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


def blocks_of(dtype: torch.dtype, units: int) -> Blocks:
    """For heads of ``units``. Split units are 16 a program, so that H = 1024 of 64 sequences is 64 programs, each with
    all sequences; what they read of W_hh in a step is then all of it, once."""
    if units <= ALONE[dtype]:
        width = max(next_power_of_2(units), 16)
        return Blocks(16, width, 16, 8 if width == 128 else 4, 3)
    return Blocks(16, 16, 16, 4, 2) if dtype == torch.float64 else Blocks(64, 16, 64 // dtype.itemsize, 8, 4)


def require(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of a tensor that is there.

    Raises:
        ValueError: if it is another than expected, or not contiguous.
    """
    if tensor is None or (tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous()):
        return
    raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype} {shape}")


@dataclass(frozen=True)
class RNNLayer:
    """One layer and direction."""

    inputs: RNNInputs
    options: RNNOptions

    @property
    def steps(self) -> int:
        x, sizes = self.inputs.x, self.inputs.batch_sizes
        return x.shape[1 if self.options.batch_first else 0] if sizes is None else sizes.shape[0]

    @property
    def hidden(self) -> int:
        return self.inputs.hx.shape[1]

    @property
    def units(self) -> int:
        """Of a head."""
        return self.inputs.weight_hh.shape[1]

    @property
    def heads(self) -> int:
        return self.hidden // self.units

    @property
    def gates(self) -> int:
        return GATES[self.options.mode]

    @property
    def cells(self) -> int:
        """C, the width of the cell state."""
        return CELLS[self.options.mode] * self.hidden

    @property
    def saved(self) -> int:
        """Numbers of a token and unit that the forward saves beside y."""
        return saved_gates(self.options.mode, self.options.clip, self.options.zoneout)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.inputs.x.shape[:-1])

    def check(self) -> None:
        """Every shape that memory safety depends on."""
        inputs, H, G = self.inputs, self.hidden, self.gates
        x, hx, B, packed = inputs.x, inputs.hx, inputs.hx.shape[0], inputs.batch_sizes is not None
        if inputs.weight_hr is not None or inputs.norms is not None:
            raise ValueError("rnn: the Triton kernels have no projection and no norms")
        if x.dim() != (2 if packed else 3) or bool(self.cells) != (inputs.cx is not None):
            raise ValueError("rnn: expected x (T, B, I), or (tokens, I) with batch_sizes, and cx for lstm and slstm")
        if H % self.units:
            raise ValueError("weight_hh: expected H columns, or H divided by the number of heads")
        if hx.dtype not in (x.dtype, accumulator(x)):
            raise ValueError("hx: expected the dtype of x, or float32 beside bfloat16 and float16")
        if not packed and x.shape[0 if self.options.batch_first else 1] != B:
            raise ValueError("hx: expected as many sequences as x")
        require("x", x, tuple(x.shape), x.dtype)
        require("hx", hx, (B, H), hx.dtype)
        require("cx", inputs.cx, (B, self.cells), hx.dtype)
        require("weight_ih", inputs.weight_ih, (G * H, x.shape[-1]), x.dtype)
        require("weight_hh", inputs.weight_hh, (G * H, self.units), x.dtype)
        require("bias_ih", inputs.bias_ih, (G * H,), x.dtype)
        require("bias_hh", inputs.bias_hh, (G * H,), x.dtype)
        require("peephole", inputs.peephole, (3, H), x.dtype)
        if inputs.batch_sizes is not None:
            sizes = inputs.batch_sizes.tolist()
            if sizes != sorted(sizes, reverse=True) or sizes[0] > B or sizes[-1] < 1 or sum(sizes) != x.shape[0]:
                raise ValueError("batch_sizes: expected at most B, never more than before, their sum rows of x")

    def offsets(self) -> Tensor | None:
        """(T + 1): where each time of a packed batch begins among the tokens. Sizes lie on the host: one small copy."""
        if self.inputs.batch_sizes is None:
            return None
        ends = self.inputs.batch_sizes.cumsum(0)
        return torch.nn.functional.pad(ends, (1, 0)).to(self.inputs.x.device, non_blocking=True)

    def sizes(self) -> Sizes:
        T, B = self.steps, self.inputs.hx.shape[0]
        return Sizes(T, B, 1, T) if self.options.batch_first else Sizes(T, B, B, 1)

    def numbers(self) -> Numbers:
        x, seed, probabilities = self.inputs.x, self.inputs.seed, (self.options.zoneout, self.options.zoneout_cell)
        numbers: list[Any] = [_random.threshold(p) if p and seed is not None else None for p in probabilities]
        for number in (*probabilities, self.options.clip):
            numbers.append(torch.full((1,), number, dtype=accumulator(x), device=x.device) if number else None)
        return Numbers._make(numbers)

    @property
    def seed(self) -> int:
        return 0 if self.inputs.seed is None else int(self.inputs.seed)

    def blocks(self) -> Blocks:
        return blocks_of(self.inputs.x.dtype, self.units)

    def shape(self, programs: int) -> RNNShape:
        x, options, blocks = self.inputs.x, self.options, self.blocks()
        return RNNShape(
            *(self.hidden, self.units, options.mode, self.gates, CELLS[options.mode], self.saved, options.reverse),
            *(_launch.acc_type(x), _precision(x.dtype), programs),
            *(blocks.rows, blocks.units, blocks.depth, blocks.num_stages),
        )

    def launch(self, kernel: Any, tensors: NamedTuple, first: int, last: int, *more: int) -> None:
        """Makes steps [first, last), in one launch if the programs of a chain can wait for each other."""
        blocks, device = self.blocks(), self.inputs.x.device
        chains = ceil_div(self.inputs.hx.shape[0], blocks.rows) * self.heads
        programs = ceil_div(self.units, blocks.units)
        alone = self.units <= ALONE[self.inputs.x.dtype]
        together = chains * programs <= _launch.multiprocessors(device) and (programs == 1 or _launch.concurrent())
        steps = [(first, last)] if alone or together else [(s, s + 1) for s in range(first, last)]
        counters = None
        if len(steps) == 1 and not alone and last - first > 1:
            counters = torch.zeros(chains, dtype=torch.int32, device=device)
        arguments = tensors, self.numbers(), counters, *self.sizes(), self.seed
        S, cooperative = self.shape(programs), counters is not None
        for step in steps:
            every = (*arguments, *step, *more)
            _launch.launch(kernel, (chains, programs), *every, S=S, num_warps=blocks.num_warps, cooperative=cooperative)


def given(tensor: Tensor) -> Tensor | None:
    """None for the empty tensor that stands for none among an op's results."""
    return tensor if tensor.numel() else None


def _precision(dtype: torch.dtype) -> str:
    """Of products of fp32, as torch's setting for recurrent layers has it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` of matrices, to fp32 (fp64) whatever they are."""
    if x.dtype == accumulator(x):
        return torch.mm(x, weight.t())
    if x.device.type == "cpu":
        return torch.mm(x.to(torch.float32), weight.to(torch.float32).t())
    return torch.mm(x, weight.t(), out_dtype=torch.float32)
