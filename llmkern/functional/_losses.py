"""What cross_entropy and linear_cross_entropy share: what a row counts for, the reduction, and the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops

OUTPUTS = ("lse", "entropy", "argmax", "accuracy")


class CrossEntropyOutput(NamedTuple):
    """The loss, and the outputs that were asked for; the others are None.

    Attributes:
        loss: as without ``outputs``.
        lse: ``logsumexp`` of each row's logits, after ``logit_scale`` and ``softcap``; differentiable.
        entropy: of each row's softmax, in nats; differentiable.
        argmax: the class of the largest logit of each row, int64.
        accuracy: a scalar: the share of rows whose argmax is the target (the most probable class of a target of
            probabilities). NaN if no row counts.

    Per-row outputs have the shape of the losses, in fp32 (fp64 for fp64). Rows that ``ignore_index`` leaves out have
    lse and entropy 0, argmax -1, and do not count for the accuracy.
    """

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    accuracy: Tensor | None = None


def check_outputs(outputs: Sequence[str]) -> None:
    if isinstance(outputs, str) or any(name not in OUTPUTS for name in outputs):
        raise ValueError(f"outputs: got {outputs!r}, expected a sequence of names among {', '.join(OUTPUTS)}")


def single(t: Tensor) -> Tensor:
    """As autocast hands a tensor to a loss: float16 and bfloat16 as float32, all else as it is."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


# The compiler hashes instances before their fields are set (torch 2.10), so not by them.
@dataclass(frozen=True, eq=False)
class Reduction:
    """From losses per row to what the user gets. ``tokens`` and ``count`` are None where they are 1 and the rows."""

    name: str
    tokens: Tensor | None  # a factor for each row
    total: Tensor | None  # what a mean divides by
    scale: Tensor | None  # what a row counts for; None where the op cannot sum

    @classmethod
    def of(
        cls,
        name: str,
        target: Tensor,
        soft: bool,
        weight: Tensor | None,
        ignore_index: int,
        token_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Reduction:
        """``target``: of the rows' shape if not ``soft``, else (N, V, *)."""
        shape = (target.shape[0], *target.shape[2:]) if soft else target.shape
        tokens = None if token_weight is None else token_weight.reshape(shape).to(dtype)
        total = None
        if name == "mean":
            per_row = tokens
            if not soft:
                counts = _target_weights(target, weight, ignore_index, dtype)
                per_row = counts if tokens is None else counts * tokens
            total = target.new_full((), math.prod(shape), dtype=dtype) if per_row is None else per_row.sum()
        # The op sums where that needs no derivative of the factors. An empty mean is no sum: it is NaN.
        if name == "none" or target.numel() == 0 or (tokens is not None and tokens.requires_grad):
            return cls(name, tokens, total, None)
        one = torch.ones((), dtype=dtype, device=target.device) if total is None else 1 / total
        return cls(name, tokens, total, (one.expand(shape) if tokens is None else tokens * one).contiguous())

    def __call__(self, rows: ops.LossRows) -> Tensor:
        if rows.total is not None:
            return rows.total
        losses = rows.loss if self.tokens is None else rows.loss * self.tokens
        if self.name == "none":
            return losses
        return losses.sum() if self.total is None else losses.sum() / self.total


def _target_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each target counts for in a mean: its class weight, 0 if ignored. Targets out of range count for nothing
    here; the kernel raises for them."""
    valid = target != ignore_index
    if weight is None:
        return valid.to(dtype)
    known = valid & (target >= 0) & (target < weight.shape[0])
    return weight.to(dtype)[target.where(known, 0)].where(known, 0)


def present(
    loss: Tensor, rows: ops.LossRows, outputs: Sequence[str], target: Tensor, soft: bool, shape: Sequence[int]
) -> Tensor | CrossEntropyOutput:
    """``loss``, with the outputs that were asked for, in ``shape``."""
    if not outputs:
        return loss
    accuracy = None
    if "accuracy" in outputs:
        assert rows.argmax is not None
        counted = rows.argmax >= 0
        right = (rows.argmax == (target.argmax(1) if soft else target)) & counted
        accuracy = right.sum() / counted.sum()
    of_rows = {"lse": rows.lse, "entropy": rows.entropy, "argmax": rows.argmax}
    wanted = {name: ops.as_shape(t, shape) for name, t in of_rows.items() if name in outputs and t is not None}
    return CrossEntropyOutput(loss, accuracy=accuracy, **wanted)
