"""Cross-entropy and negative log-likelihood, as ``torch.nn.functional`` has them, with a language model's options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from .. import dispatch, ops, reference


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
) -> Tensor:
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

    Returns:
        A scalar, or with ``"none"`` the losses of the target's shape; of ``input``'s dtype. ``"mean"`` divides by the
        sum of ``weight[target] * token_weight`` over the targets that are not ignored (with probabilities: by the
        number of targets, or the sum of ``token_weight``).

    Raises:
        IndexError: if an index is neither ``ignore_index`` nor in [0, C): "Target 7 is out of bounds."
        ValueError: if ``token_weight`` has another shape than the losses.

    Losses are computed and summed in fp32 (fp64 for fp64). No input is written to.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    extra = {"z_loss": z_loss != 0, "softcap": bool(softcap), "logit_scale": logit_scale != 1}
    extra["token_weight"] = token_weight is not None
    if not _well_formed(input, target, weight, reduction, label_smoothing, token_weight):
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    soft = target.shape == input.shape
    used = {
        "weight": weight is not None,
        "label_smoothing": label_smoothing != 0,
        "probabilities": soft,
        **extra,
    }
    if torch.is_autocast_enabled(input.device.type):
        input, weight = input.float(), None if weight is None else weight.float()
    tensors = [t for t in (input, weight) if t is not None]
    backend = dispatch.pick("cross_entropy", *tensors, options=[name for name, on in used.items() if on])
    if backend == "torch":
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale)
    logits = _rows(input)
    if soft:
        losses = reference.cross_entropy(logits, _rows(target), weight, *options)
        per_target = None
        scale = None
    else:
        target = target.reshape(-1).to(torch.int64)
        per_target = _target_weights(target, weight, ignore_index, losses_dtype(input))
    if token_weight is not None:
        tokens = token_weight.reshape(-1).to(losses_dtype(input))
        per_target = tokens if per_target is None else per_target * tokens
    total = None
    if reduction == "mean":
        total = (
            input.new_full((), logits.shape[0], dtype=losses_dtype(input)) if per_target is None else per_target.sum()
        )
    if not soft:
        scale = _expected_gradient(logits, reduction, total, token_weight)
        losses = ops.cross_entropy(logits, target.contiguous(), weight, scale, *options, backend)
    if token_weight is not None:
        losses = losses * tokens
    if reduction == "none":
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
        return losses.to(input.dtype).reshape(shape)
    return (losses.sum() if total is None else losses.sum() / total).to(input.dtype)


def losses_dtype(input: Tensor) -> torch.dtype:
    """What losses of such logits are computed in."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _rows(input: Tensor) -> Tensor:
    """(N, C, d1, ...) as contiguous rows (N * d1 * ..., C)."""
    if input.dim() > 2:
        input = input.movedim(1, -1)
    return input.reshape(-1, input.shape[-1]).contiguous()


def _well_formed(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    token_weight: Tensor | None,
) -> bool:
    """Whether the call is one that torch would accept; if not, torch gets it, for its error."""
    if input.dim() == 0 or not input.is_floating_point() or target.device != input.device:
        return False
    classes = input.shape[0 if input.dim() == 1 else 1]
    outer = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape == input.shape:
        fits = target.is_floating_point()
    else:
        fits = target.shape == outer and target.dtype in (torch.int64, torch.uint8)
    if weight is not None:
        fits = fits and weight.shape == (classes,) and weight.dtype == input.dtype and not weight.requires_grad
    fits = fits and classes > 0 and reduction in ("none", "mean", "sum") and 0 <= label_smoothing <= 1
    if fits and token_weight is not None and token_weight.shape != outer:
        raise ValueError(
            f"token_weight: got shape {tuple(token_weight.shape)}, expected that of the losses, {tuple(outer)}"
        )
    return fits


def _target_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each target counts for in a mean: its class weight, 0 if ignored. Targets out of range count for nothing
    here; the kernel raises for them."""
    valid = target != ignore_index
    if weight is None:
        return valid.to(dtype)
    known = valid & (target >= 0) & (target < weight.shape[0])
    return weight.to(dtype)[target.where(known, 0)].where(known, 0)


def _expected_gradient(
    logits: Tensor, reduction: str, total: Tensor | None, token_weight: Tensor | None
) -> Tensor | None:
    """The gradient that the losses will get if the reduced loss gets 1."""
    if reduction == "none" or not (logits.requires_grad and torch.is_grad_enabled()):
        return None
    one = torch.ones((), dtype=losses_dtype(logits), device=logits.device)
    if total is not None:
        one = one / total.detach()
    rows = one.expand(logits.shape[0])
    return (rows if token_weight is None else rows * token_weight.detach().reshape(-1)).contiguous()


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
    dispatch.pick("nll_loss", input)
    return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
