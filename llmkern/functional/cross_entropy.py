"""Cross-entropy and negative log-likelihood, as ``torch.nn.functional`` has them, with a language model's options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function

from .. import dispatch, ops
from .._facts import accumulate_dtype
from .._torch import F
from ._losses import CrossEntropyOutput, Reduction, check_outputs, present, single
from ._overrides import overridden


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    outputs: Sequence[str],
    inplace: bool = False,
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    outputs: tuple[()] = (),
    inplace: bool = False,
) -> Tensor: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    outputs: Sequence[str] = (),
    inplace: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy between logits and targets; see :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices (int64 or uint8) of ``input``'s shape without C, or probabilities of ``input``'s shape.
        weight: a weight per class ``(C)``. Default: ones.
        ignore_index: index targets of this value count for nothing. Default: -100.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        label_smoothing: in [0, 1]. Default: 0.
        size_average, reduce: deprecated, as in torch.
        z_loss: adds ``z_loss * logsumexp(logits)**2`` to every row (PaLM, arXiv 2204.02311, section 5). Default: 0.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118). Default: none.
        logit_scale: logits are multiplied by this first, before ``softcap``. Default: 1.
        token_weight: multiplies each target's loss, of the losses' shape. Default: ones.
        outputs: names among ``"lse"``, ``"entropy"``, ``"argmax"`` and ``"accuracy"``: what to return beside the loss,
            from the same pass over the logits. Default: nothing.
        inplace: lets the gradient take the place of the logits, which saves as much memory. ``input`` must not be used
            afterwards, and the loss allows one backward. Where no gradient is made at once (no grad mode,
            ``reduction="none"``, another backend, under the compiler) nothing is overwritten. Default: ``False``.

    Returns:
        A scalar, or with ``"none"`` the losses of the target's shape; of ``input``'s dtype. ``"mean"`` divides by the
        sum of ``weight[target] * token_weight`` over the targets that are not ignored (with probabilities: by the
        number of targets, or the sum of ``token_weight``). With ``outputs`` a :class:`CrossEntropyOutput`.

    Raises:
        IndexError: if an index is neither ``ignore_index`` nor in [0, C): "Target 7 is out of bounds."
        ValueError: if ``token_weight`` has another shape than the losses, or for an unknown name in ``outputs``.

    Losses are computed and summed in fp32 (fp64 for fp64). No input is written to, but with ``inplace``.
    """
    if overridden("cross_entropy", input, target, weight, token_weight):
        positional: Any = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        own: dict[str, Any] = {"z_loss": z_loss, "softcap": softcap, "logit_scale": logit_scale}
        own |= {"token_weight": token_weight, "outputs": outputs, "inplace": inplace}
        if z_loss == 0 and not softcap and logit_scale == 1 and token_weight is None and not outputs:
            return F.cross_entropy(*positional)
        public: Any = cross_entropy
        answer = handle_torch_function(public, (input, target, weight, token_weight), *positional, **own)
        if isinstance(answer, CrossEntropyOutput) and isinstance(answer.loss, Iterator):
            # The default of subclasses makes what it converts of one iterator, which is good for torch's own tuples.
            return CrossEntropyOutput._make(answer.loss)
        return answer
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    check_outputs(outputs)
    not_plain = dispatch.not_plain(input, target, weight, token_weight)
    if not_plain != dispatch.NESTED and not _well_formed(
        input, target, weight, ignore_index, reduction, label_smoothing, token_weight
    ):
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    soft = not_plain != dispatch.NESTED and target.shape == input.shape
    used = {
        "weight": weight is not None,
        "label_smoothing": label_smoothing != 0,
        "probabilities": soft,
        "z_loss": z_loss != 0,
        "softcap": bool(softcap),
        "logit_scale": logit_scale != 1,
        "token_weight": token_weight is not None,
        "outputs": bool(outputs),
    }
    x, t = input, target
    if dispatch.autocasts(input):
        x, t, weight = single(x), single(t), None if weight is None else single(weight)
    if soft:
        x, t = (both.to(torch.promote_types(x.dtype, t.dtype)) for both in (x, t))
    options = [*not_plain, *(name for name, on in used.items() if on)]
    backend = dispatch.pick("cross_entropy", *_tensors(x, weight), options=options)
    if backend == "torch":
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    logits, *probabilities = _canonical(x, t) if soft else _canonical(x)
    shape = (logits.shape[0], *logits.shape[2:])
    t = probabilities[0] if soft else t.reshape(shape).to(torch.int64).contiguous()
    reduced = Reduction.of(reduction, t, soft, weight, ignore_index, token_weight, accumulate_dtype(x.dtype))
    rows = ops.loss_rows(
        ops.LossInputs(logits, None, None, t, None if weight is None else weight.contiguous()),
        reduced.scale,
        ops.LossOptions(ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale),
        backend,
        entropy="entropy" in outputs,
        argmax="argmax" in outputs or "accuracy" in outputs,
        inplace=inplace and not torch.compiler.is_compiling() and logits.data_ptr() == input.data_ptr(),
    )
    outer = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    loss = reduced(rows).to(x.dtype)
    return present(ops.as_shape(loss, outer) if reduction == "none" else loss, rows, outputs, t, soft, outer)


def _tensors(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _canonical(input: Tensor, *others: Tensor) -> list[Tensor]:
    """Tensors of one shape, (C), (N, C) or (N, C, d1, ...), all as contiguous (N, C) or all as (N, C, D): classes side
    by side if the first one's lie so. Rows of one are rows of all, however each lies in memory."""
    tensors = (input, *others)
    if input.dim() <= 2:
        return [torch.atleast_2d(t).contiguous() for t in tensors]
    if input.movedim(1, -1).is_contiguous():
        return [t.movedim(1, -1).reshape(-1, t.shape[1]).contiguous() for t in tensors]
    flat = [t.reshape(*t.shape[:2], -1).contiguous() for t in tensors]
    return [t.squeeze(2) for t in flat] if flat[0].shape[2] == 1 else flat


def _well_formed(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    token_weight: Tensor | None,
) -> bool:
    """Whether the call is one that torch would accept; if not, torch gets it, for its error."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return False
    if input.dim() == 0 or not input.is_floating_point() or target.device != input.device:
        return False
    classes = input.shape[0 if input.dim() == 1 else 1]
    outer = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape == input.shape:
        fits = target.is_floating_point() and ignore_index < 0
    else:
        fits = target.shape == outer and target.dtype in (torch.int64, torch.uint8)
    if weight is not None:
        fits = fits and isinstance(weight, Tensor) and weight.shape == (classes,)
        fits = fits and weight.dtype == input.dtype and not weight.requires_grad
    fits = fits and classes > 0 and reduction in ("none", "mean", "sum") and 0 <= label_smoothing <= 1
    if fits and token_weight is not None and token_weight.shape != outer:
        raise ValueError(
            f"token_weight: got shape {tuple(token_weight.shape)}, expected that of the losses, {tuple(outer)}"
        )
    return fits


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The negative log-likelihood of log-probabilities; see :func:`torch.nn.functional.nll_loss`.

    A gather: torch's own serves it on every device.
    """
    if not overridden("nll_loss", input, target, weight):
        dispatch.pick("nll_loss", input)
    return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
