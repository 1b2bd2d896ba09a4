"""Cross-entropy of linearly transformed inputs, as ``torch.nn.functional`` has it from torch 2.13 on.

The fused kernel takes logits in chunks and never has them as a whole. What it does not serve is composed:
``llmkern.functional.linear`` gives logits, its ``cross_entropy`` the loss.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import dispatch, functional, ops
from .._facts import accumulate_dtype
from .._torch import F
from ._losses import CrossEntropyOutput, Reduction, check_outputs, present
from ._overrides import overridden

_TORCH_CHUNKS = hasattr(F, "linear_cross_entropy")
WORKSPACE = 64 << 20
_CAST = (torch.float32, torch.bfloat16, torch.float16)


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    outputs: Sequence[str],
    workspace: int = WORKSPACE,
) -> CrossEntropyOutput: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    outputs: tuple[()] = (),
    workspace: int = WORKSPACE,
) -> Tensor: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    outputs: Sequence[str] = (),
    workspace: int = WORKSPACE,
) -> Tensor | CrossEntropyOutput:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``; see torch 2.13's function.

    Args:
        input: ``(*, H)``. torch takes at most one batch dimension, this function any number.
        linear_weight: ``(C, H)``, or ``(C, d_1, ..., d_K, H)`` for a K-dimensional loss, which needs a batch.
        target: indices ``(*, d_1, ..., d_K)`` in ``[0, C)``, or probabilities ``(*, C, d_1, ..., d_K)``.
        linear_bias: ``(C, d_1, ..., d_K)``. Default: none.
        weight: a factor ``(C,)`` for each class. Default: none.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        ignore_index: a class index that counts for nothing; not with probabilities. Default: -100.
        label_smoothing: in ``[0, 1]``, mixes the target with the uniform distribution. Default: 0.
        options: ``torch.nn.LinearCrossEntropyOptions``. The kernel takes ``batch_chunk_size`` from it; sums are in fp32
            and a second backward is allowed whatever it says. Where no kernel serves, it means torch's chunked
            function, and where torch cannot chunk, a warning says so. Default: none.
        z_loss: adds ``z_loss * logsumexp(logits)^2``. Default: 0.
        softcap: bounds the logits to ``softcap * tanh(logits / softcap)``. Default: off.
        logit_scale: multiplies the logits. Default: 1.
        token_weight: a factor ``(*, d_1, ..., d_K)`` for each row's loss. Default: none.

        outputs: names of what to return beside the loss, from the same pass. Default: nothing.
        workspace: bytes that the kernel's chunk of logits, which their gradient overwrites, may take; a row is taken
            in any case. Default: 64 MiB, for any number of rows. In bf16 and fp16 the weight's gradient takes another
            4 bytes for each of its elements, to be summed in fp32, if there are several chunks. On a GPU a workspace
            that does not hold the logits of 1,024 rows is filled with some classes of all rows instead: then it is the
            input's gradient that is summed in fp32, and logits are computed twice.

    The last six are llmkern's own; :func:`llmkern.functional.cross_entropy` defines the first five.

    Returns:
        A scalar, or ``(*, d_1, ..., d_K)`` for ``"none"``; of the arguments' dtype (under autocast: fp32). With
        ``outputs`` a :class:`CrossEntropyOutput`.

    Raises:
        RuntimeError: for shapes that do not fit, or an ``ignore_index`` with probabilities.
        IndexError: for a class index outside ``[0, C)``.
        ValueError: for a ``workspace`` that is not positive, or an unknown name in ``outputs``.

    The kernel sums in fp32 (fp64 for fp64), skips ignored rows (on a CPU before the first product), and computes only
    the gradients that are needed: those of a reduced loss in the forward.
    """
    _check(input, linear_weight, target, linear_bias, ignore_index)
    check_outputs(outputs)
    if workspace < 1:
        raise ValueError(f"workspace: got {workspace}, expected a positive number of bytes")
    batch, (_, *out_features, in_features) = input.shape[:-1], linear_weight.shape
    rows = math.prod(batch)
    if len(batch) > 1:
        input, target = input.reshape(rows, in_features), target.reshape(rows, *target.shape[len(batch) :])
        token_weight = None if token_weight is None else token_weight.reshape(rows, *out_features)
    own: dict[str, Any] = {
        "z_loss": z_loss or None,
        "softcap": softcap or None,
        "logit_scale": None if logit_scale == 1.0 else logit_scale,
        "token_weight": token_weight,
        "outputs": outputs or None,
    }
    extras = {name: value for name, value in own.items() if value is not None}
    common: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    chunked = options is not None
    operands = [t for t in (input, linear_weight, linear_bias) if t is not None]
    # What is float64 stays so, and mixed with others it is torch's to refuse.
    autocast = dispatch.autocasts(input)
    autocast = autocast and all(t.dtype != torch.float64 for t in operands)
    if autocast:
        operands = [t.to(torch.get_autocast_dtype(input.device.type)) for t in operands]
    not_plain = dispatch.not_plain(input, linear_weight, linear_bias, target, weight, token_weight)
    if overridden("linear_cross_entropy", *operands, target, weight, token_weight):
        # torch's composition asks in each of its parts.
        backend = "torch"
    else:
        backend = dispatch.pick(
            "linear_cross_entropy",
            *operands,
            options=[*extras, *["options"] * chunked, *not_plain],
            torch_does=None if chunked else "linear, then cross_entropy",
        )
    # What is not well formed is composed, for torch's errors; a product of nothing needs no kernel.
    well_formed = _well_formed(input, linear_weight, target, linear_bias, common, autocast)
    if backend in ("torch", "reference") or not well_formed:
        loss = _composed(input, linear_weight, target, linear_bias, ignore_index, options, backend, common, extras)
    else:
        if options is not None and options.batch_chunk_size is not None:
            workspace = options.batch_chunk_size * linear_weight.shape[0] * accumulate_dtype(operands[0].dtype).itemsize
        result = torch.float32 if autocast else input.dtype
        ignored = -100 if ignore_index is None else ignore_index
        loss = _fused(operands, target, ignored, workspace, backend, common, own, result)
    if len(batch) < 2:
        return loss
    if isinstance(loss, CrossEntropyOutput):
        shaped = [t if t is None or t.dim() == 0 else ops.as_shape(t, (*batch, *out_features)) for t in loss]
        return CrossEntropyOutput._make(shaped)
    return ops.as_shape(loss, (*batch, *out_features)) if reduction == "none" else loss


def _well_formed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    common: dict[str, Any],
    autocast: bool,
) -> bool:
    """Whether torch would accept the call, but for what :func:`_check` knows, and there is something to multiply."""
    weight, batch, (classes, *inner, in_features) = common["weight"], input.shape[:-1], linear_weight.shape
    if target.shape == (*batch, classes, *inner):
        fits = target.is_floating_point()
    else:
        fits = target.shape == (*batch, *inner) and target.dtype in (torch.int64, torch.uint8)
    if weight is not None:
        fits = fits and isinstance(weight, Tensor) and weight.shape == (classes,) and not weight.requires_grad
        fits = fits and weight.dtype in (_CAST if autocast else (input.dtype,))
    fits = fits and 0 not in (classes, *inner, in_features) and common["reduction"] in ("none", "mean", "sum")
    return fits and 0 <= common["label_smoothing"] <= 1


def _fused(
    operands: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    workspace: int,
    backend: str,
    common: dict[str, Any],
    own: dict[str, Any],
    result: torch.dtype,
) -> Tensor | CrossEntropyOutput:
    input, linear_weight, *bias = operands
    classes, *inner, in_features = linear_weight.shape
    x = input.reshape(math.prod(input.shape[:-1]), in_features).contiguous()
    accumulated, weight, wanted = accumulate_dtype(input.dtype), common["weight"], own["outputs"] or ()
    soft = target.shape == (*input.shape[:-1], classes, *inner)
    if soft:
        result = torch.promote_types(result, target.dtype)
        kept = target.dtype in (accumulated, input.dtype)
        t = target.reshape(x.shape[0], classes, *inner).to(target.dtype if kept else accumulated)
    else:
        t = target.reshape(x.shape[0], *inner).to(torch.int64)
    reduced = Reduction.of(common["reduction"], t, soft, weight, ignore_index, own["token_weight"], accumulated)

    steps = ops.LossOptions(
        ignore_index,
        common["label_smoothing"],
        own["z_loss"] or 0.0,
        own["softcap"] or 0.0,
        own["logit_scale"] or 1.0,
    )

    def run(linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, scale: Tensor | None) -> ops.LossRows:
        tensors = (x, linear_weight, linear_bias, target, weight)
        return ops.loss_rows(
            ops.LossInputs._make(None if t is None else t.contiguous() for t in tensors),
            scale,
            steps,
            backend,
            entropy="entropy" in wanted,
            argmax="argmax" in wanted or "accuracy" in wanted,
            workspace=workspace,
        )

    if inner:
        # Each place of the K dimensions has a weight and targets of its own.
        places = math.prod(inner)
        biases = bias[0].flatten(1).unbind(1) if bias else [None] * places
        targets = t.flatten(2).unbind(2) if soft else t.flatten(1).unbind(1)
        each = zip(linear_weight.flatten(1, -2).unbind(1), biases, targets, [None] * places, strict=True)
        _, *parts = zip(*(run(*place) for place in each), strict=True)
        stacked = [None if part[0] is None else torch.stack(part, 1).unflatten(1, inner) for part in parts]
        rows = ops.LossRows._make([None, *stacked])
    else:
        rows = run(linear_weight, bias[0] if bias else None, t, reduced.scale)
    outer = (*input.shape[:-1], *inner)
    loss = reduced(rows).to(result)
    return present(ops.as_shape(loss, outer) if common["reduction"] == "none" else loss, rows, wanted, t, soft, outer)


def _composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
    options: Any,
    backend: str,
    common: dict[str, Any],
    extras: dict[str, Any],
) -> Tensor | CrossEntropyOutput:
    """torch's chunked function, if ``options`` ask for it and it can; else the definition."""
    if options is not None and _can_chunk(extras) and backend == "torch":
        return F.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            options=options,
            **common,
        )
    num_classes, *out_features, _ = linear_weight.shape
    flat_weight, flat_bias = linear_weight, linear_bias
    if out_features:
        flat_weight = linear_weight.flatten(0, -2)
        flat_bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = functional.linear(input, flat_weight, flat_bias)
    logits = logits.reshape(*input.shape[:-1], num_classes, *out_features) if out_features else logits
    ignored = -100 if ignore_index is None else ignore_index
    return functional.cross_entropy(logits, target, ignore_index=ignored, **common, **extras)


def _can_chunk(extras: dict[str, Any]) -> bool:
    """Whether torch's chunked function knows the call; what torch itself cannot chunk, it says itself."""
    if _TORCH_CHUNKS and not extras:
        return True
    reason = f"it does not know {', '.join(extras)}" if extras else f"torch {torch.__version__} has none"
    warnings.warn(f"linear_cross_entropy: ``options`` ignored; chunked path: {reason}.", stacklevel=4)
    return False


def _check(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, ignore_index: int | None
) -> None:
    """torch's checks, in torch's order and words; a third batch dimension is no error here."""
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    batch, in_features = input.shape[:-1], input.shape[-1]
    if in_features != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    num_classes, *out_features = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if out_features and not batch:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires"
            f" batched input, (N, {in_features}), got unbatched"
            f" input with shape {tuple(input.shape)}"
        )
    indices, probabilities = (*batch, *out_features), (*batch, num_classes, *out_features)
    if target.shape == probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if len(batch) > 1 and tuple(target.shape) not in (indices, probabilities):
        raise RuntimeError(
            f"expected target shape {indices} (class indices) or {probabilities} (probabilities), "
            f"got {tuple(target.shape)}"
        )
