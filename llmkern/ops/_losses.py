"""The autograd of cross-entropy, from logits and from the input of a linear layer.

Both are one function of *primals*: (logits,) or (x, linear_weight, linear_bias), and the target where it holds
probabilities. Both give per-row outputs, and a ``total``: the sum of the losses times ``scale``. functional knows what
a row counts for, so the gradient of ``total`` is known before the backward but for a factor, and the forward kernel
computes it in the same pass. The backward hands out this precomputed gradient, times the factor, or a copy of it where
the graph is kept for another backward; if other cotangents come (on the rows, or in a graph of the backward), it is
computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from .._groups import LOSS_PRIMALS, LossInputs, LossOptions
from ..reference.cross_entropy import cross_entropy
from ..reference.linear_cross_entropy import linear_cross_entropy
from ._autograd import (
    KernelFunction,
    differentiating,
    keeps_graph,
    plain_backward,
    pure,
    reference_jvp,
    reference_vjp,
    reference_vjp_vjp,
    takes,
    zeros_for_none,
)
from ._library import OPS
from .grad_norm import may_change, scale_

_ROWS = 3  # differentiable ones: loss, lse, entropy


class LossRows(NamedTuple):
    """What an op gives: ``total`` () or None; the rest per row, entropy and argmax None if they are not wanted."""

    total: Tensor | None
    loss: Tensor
    lse: Tensor
    entropy: Tensor | None
    argmax: Tensor | None


def empty_rows(like: Tensor, shape: Sequence[int], entropy: bool, argmax: bool) -> tuple[Tensor, ...]:
    """Empty results for a fake: loss, lse, entropy, argmax."""
    sizes = (shape, shape, shape if entropy else (0,))
    rows = tuple(like.new_empty(size, dtype=accumulate_dtype(like.dtype)) for size in sizes)
    return (*rows, like.new_empty(shape if argmax else (0,), dtype=torch.int64))


def _op(phase: str, linear: bool) -> Any:
    return OPS[f"{'linear_' * linear}cross_entropy_{phase}"]


class LossFunction(KernelFunction):
    """(total, loss, lse, entropy, argmax) and, precomputed, the gradients of total by the primals."""

    @staticmethod
    @takes(LossInputs, "scale", "options", "workspace", "entropy", "argmax", "precompute", "inplace", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, scale, options, workspace, entropy, argmax, precompute, inplace, backend = arguments
        x, linear_weight, _, target, weight = inputs
        # Without a total they are those of each row's loss, to be multiplied by what comes for the row.
        dloss = scale
        if precompute and scale is None:
            dloss = torch.ones((x.shape[0], *x.shape[2:]), dtype=accumulate_dtype(x.dtype), device=x.device)
        dloss = dloss if precompute else None
        need = [precompute and t is not None and t.requires_grad for t in inputs[:LOSS_PRIMALS]]
        wanted = (entropy, argmax)
        if linear_weight is not None:
            rows = _op("forward", True)(*inputs, dloss, *options, workspace, *wanted, *need, backend)
        elif inplace and need[0]:
            logits = x.detach()
            *rows, dtarget = _op("forward_", False)(logits, target, weight, dloss, *options, *wanted, need[-1], backend)
            rows += [logits, dtarget]
        else:
            rows = _op("forward", False)(x, target, weight, dloss, *options, *wanted, need[0], need[-1], backend)
        total = rows[0].new_empty(0) if scale is None else (rows[0] * scale).sum()
        return (total, *rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.workspace, ctx.entropy, _, precompute, ctx.inplace, ctx.backend = inputs
        x, linear_weight, _, target, _, scale = tensors
        ctx.linear, ctx.total = linear_weight is not None, scale is not None
        ctx.precomputed = _spread(ctx.linear, output[5:]) if precompute else None
        # A row that is left out gets nothing, whatever its cotangent.
        ctx.left_out = (
            target == ctx.options.ignore_index if precompute and not ctx.total and not _counts(target) else None
        )
        ctx.mark_non_differentiable(*output[4:])
        # Autograd would make zeros for the gradients, as large as they are, on every backward.
        ctx.set_materialize_grads(False)
        inplace = ctx.inplace and precompute
        ctx.save_for_backward(None if inplace else x, *tensors[1:])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, *drows: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch.func gives zeros even for what is empty because it was not asked for.
        given = [d if d is not None and (i < 2 or ctx.entropy) else None for i, d in enumerate(drows[:_ROWS])]
        dtotal = dtotal if ctx.total else None
        need = ctx.needs_input_grad[:LOSS_PRIMALS]
        if dtotal is None and all(d is None for d in given):
            return (None,) * len(ctx.needs_input_grad)
        total_alone, loss_alone = all(d is None for d in given), given[1] is given[2] is None
        if ctx.precomputed is not None and dtotal is not None and total_alone and plain_backward(dtotal):
            # Before another backward through this graph the logits may change: torch has kept probabilities.
            again, gradients = keeps_graph() and not ctx.inplace, ctx.precomputed
            ctx.precomputed = gradients if again else None
            gradients = [g.clone() if again and g is not None else g for g in gradients]
            # Mostly it is 1.
            if may_change(dtotal):
                scale_([g for g in gradients if g is not None], dtotal.double(), ctx.backend)
        elif ctx.precomputed is not None and not ctx.total and loss_alone and plain_backward(given[0]):
            # Here they may have changed before the first backward, too.
            dloss = given[0]
            assert dloss is not None
            dloss = dloss if ctx.left_out is None else dloss.masked_fill(ctx.left_out, 0)
            again, gradients = keeps_graph(), ctx.precomputed
            gradients = [g if g is None else _rows_times(g, dloss, in_place=not again) for g in gradients]
            ctx.precomputed = ctx.precomputed if again else None
        else:
            *inputs, scale = ctx.saved_tensors
            if inputs[0] is None:
                raise RuntimeError(
                    "cross_entropy: the logits were overwritten by inplace=True, which allows one backward, of the"
                    " loss alone; use inplace=False"
                )
            if dtotal is not None:
                given[0] = dtotal * scale if given[0] is None else given[0] + dtotal * scale
            given = [None if d is None else d.contiguous() for d in given]
            gradients = LossBackwardFunction.run(*given, *inputs, ctx.options, ctx.workspace, need, ctx.backend)
        wanted = [g if n and g is not None else None for g, n in zip(gradients, need, strict=True)]
        return *wanted, *[None] * (len(ctx.needs_input_grad) - len(wanted))

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, scale = ctx.saved_tensors
        primals, function = _reference(inputs, ctx.options, (0, 1, 2))
        moved = [t for t, p in zip(tangents, inputs[:LOSS_PRIMALS], strict=False) if _counts(p)]
        loss, lse, entropy = reference_jvp(function, primals, zeros_for_none(moved, primals))
        total = loss.new_empty(0) if scale is None else (loss * scale).sum()
        entropy = entropy if ctx.entropy else loss.new_empty(0)
        return total, loss, lse, entropy, *(None,) * (1 + (4 if ctx.linear else 2))


class LossBackwardFunction(KernelFunction):
    """The gradients of the primals, for cotangents on the rows; those not needed are empty."""

    @staticmethod
    @takes("dloss", "dlse", "dentropy", LossInputs, "options", "workspace", "need", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, options, workspace, need, backend = arguments
        x, linear_weight, _, target, weight = tensors[_ROWS:]
        if linear_weight is None:
            tensors = [*tensors[:_ROWS], x, target, weight]
            dx, dtarget = _op("backward", False)(*tensors, *options, need[0], need[-1], backend)
            gradients = (dx, x.new_empty(0), x.new_empty(0), dtarget)
        else:
            gradients = _op("backward", True)(*tensors, *options, workspace, *need, backend)
        # Forward mode wants no integers among what it moves.
        return gradients if need[-1] else (*gradients[:-1], x.new_empty(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, _, ctx.need, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dgradients: Tensor) -> tuple[Tensor | None, ...]:
        given, inputs = ctx.saved_tensors[:_ROWS], ctx.saved_tensors[_ROWS:]
        kinds = tuple(i for i in range(_ROWS) if given[i] is not None)
        primals, function = _reference(inputs, ctx.options, kinds)
        places = [i for i, p in enumerate(inputs[:LOSS_PRIMALS]) if _counts(p)]
        moved = [dgradients[i] if ctx.need[i] else torch.zeros_like(p) for i, p in zip(places, primals, strict=True)]
        of_primals, of_given = reference_vjp_vjp(function, primals, [given[i] for i in kinds], moved)
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, gradient in zip(kinds, of_given, strict=True):
            results[i] = gradient
        for i, gradient in zip(places, of_primals, strict=True):
            results[_ROWS + i] = gradient
        return tuple(results)

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        given, inputs = ctx.saved_tensors[:_ROWS], ctx.saved_tensors[_ROWS:]
        kinds = tuple(i for i in range(_ROWS) if given[i] is not None)
        primals, function = _reference(inputs, ctx.options, kinds)
        count = len(primals)

        def gradient(*arguments: Tensor) -> tuple[Tensor, ...]:
            cotangents = arguments[count:]
            return reference_vjp(function, arguments[:count], cotangents[0] if len(kinds) == 1 else cotangents)

        everything = (*primals, *(given[i] for i in kinds))
        places = [i for i, p in enumerate(inputs[:LOSS_PRIMALS]) if _counts(p)]
        moved = [*(tangents[_ROWS + i] for i in places), *(tangents[i] for i in kinds)]
        dgradients = dict(
            zip(places, reference_jvp(gradient, everything, zeros_for_none(moved, everything)), strict=True)
        )
        nothing = primals[0].new_empty(0)
        return tuple(dgradients[i] if need and i in dgradients else nothing for i, need in enumerate(ctx.need))


def _rows_times(gradient: Tensor, dloss: Tensor, in_place: bool) -> Tensor:
    """Each row's gradient (N, V) or (N, V, D), times what came for its loss."""
    factors = dloss.unsqueeze(1)
    return gradient.mul_(factors) if in_place else (gradient * factors).to(gradient.dtype)


def _counts(primal: Tensor | None) -> bool:
    """Whether it is there and has derivatives at all: an index target has none."""
    return primal is not None and primal.is_floating_point()


def _spread(linear: bool, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The forward's gradients in the order of the primals; None for what is empty because it was not wanted."""
    places = gradients if linear else (gradients[0], None, None, gradients[1])
    return [g if g is not None and g.numel() else None for g in places]


def _reference(
    inputs: Sequence[Tensor | None], options: LossOptions, kinds: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], Any]:
    """The primals that have derivatives, and the reference as a function of them that gives rows of these kinds."""
    primals, weight = inputs[:LOSS_PRIMALS], inputs[LOSS_PRIMALS]

    def function(*moving: Tensor) -> Any:
        rest = iter(moving)
        x, linear_weight, linear_bias, target = (next(rest) if _counts(p) else p for p in primals)
        assert x is not None
        assert target is not None
        if linear_weight is None:
            rows = cross_entropy(x, target, weight, options)
        else:
            rows = linear_cross_entropy(x, linear_weight, linear_bias, target, weight, options)
        return rows[kinds[0]] if len(kinds) == 1 else tuple(rows[kind] for kind in kinds)

    return tuple(p for p in primals if p is not None and _counts(p)), function


def loss_rows(
    inputs: LossInputs,
    scale: Tensor | None,
    options: LossOptions,
    backend: str,
    *,
    entropy: bool = False,
    argmax: bool = False,
    inplace: bool = False,
    workspace: int = 0,
) -> LossRows:
    """The outputs, from a backend.

    Args:
        scale: of the losses' shape, in fp32 (fp64 for fp64): what a row's loss counts for in ``total``; None: no total.
        entropy, argmax: whether they are wanted.
        inplace: whether the gradient may take the place of the logits; not with a linear layer.
        workspace: bytes that logits of a linear layer and their gradients may take.
    """
    primals = inputs[:LOSS_PRIMALS]
    if backend == "reference":
        moving, function = _reference(inputs, options, (0, 1, 2, 3))
        loss, lse, entropies, best = function(*moving)
        total = None if scale is None else (loss * scale).sum()
        return LossRows(total, loss, lse, entropies if entropy else None, best if argmax else None)
    differentiated = differentiating(*primals)
    # Eager only: a compiler and torch.func see a pure function.
    eager = not pure()
    summed = scale is not None or (inputs.linear_weight is None and inputs.x.numel() > 0)
    precompute = differentiated and summed and torch.is_grad_enabled() and eager
    inplace = inplace and precompute and scale is not None
    if inputs.linear_bias is not None and differentiated and eager and not precompute:
        # The logits are computed again in the backward, before which a bias may change: torch's product keeps none.
        inputs = inputs._replace(linear_bias=inputs.linear_bias.clone())
    call = LossFunction.run if differentiated else LossFunction.forward
    rows = call(*inputs, scale, options, workspace, entropy, argmax, precompute, inplace, backend)
    total, loss, lse, entropies, best = rows[:5]
    if inplace:
        # The op wrote behind autograd's back: whoever saved the logits for a backward of their own must know.
        torch.autograd.graph.increment_version(inputs.x)
    return LossRows(
        None if scale is None else total, loss, lse, entropies if entropy else None, best if argmax else None
    )
