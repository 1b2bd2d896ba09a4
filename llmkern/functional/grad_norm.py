"""Gradient clipping, as ``torch.nn.utils`` has it, for dense and for sparse gradients."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from .._torch import clip_grad_norm_ as torch_clip_grad_norm_
from .._torch import get_total_norm
from ..ops.grad_norm import grad_norm, may_change, scale_
from ..ops.sparse_optim import sparse_grad_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales all gradients by ``min(1, max_norm / (norm + 1e-6))``, in place, where ``norm`` is their length as one
    vector; see :func:`torch.nn.utils.clip_grad_norm_`.

    Args:
        parameters: a tensor or an iterable of tensors; those without ``grad`` are passed over. Gradients may be sparse
            COO tensors: entries of one index count as their sum, which is what the gradient is there.
        max_norm: what the norm may be at most.
        norm_type: of the p-norm; ``inf`` is the largest absolute value. Default: 2.
        error_if_nonfinite: raise, and change nothing, if the norm is infinite or NaN. Default: ``False``: gradients
            are then scaled by 0 or NaN.
        foreach: names one of torch's implementations, and changes nothing here. Default: ``None``.

    Returns:
        The norm before clipping, a scalar of the gradients' dtype.

    Raises:
        RuntimeError: for a norm that is not finite, if ``error_if_nonfinite``.

    The norm is summed in fp64 and meets the gradients unrounded: in low precision they are clipped to ``max_norm``, not
    to a neighbour of it. Gradients that are short enough are not written.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif not isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
    else:
        # torch warns of an empty generator.
        parameters = list(parameters) or parameters
    grads = [] if isinstance(parameters, types.GeneratorType) else [p.grad for p in parameters if p.grad is not None]
    kinds = by_backend(grads, norm_type)
    if all(backend == "torch" and not any(grad.is_sparse for grad in members) for backend, members in kinds):
        return torch_clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = total_norm(kinds, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot "
            "be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    factor = clip_factor(norm, max_norm)
    tables: list[Any] = [p for p in parameters if issubclass(type(p), ops.RowParameter) and p.grad is not None]
    if tables and not factor.isfinite():
        # Times NaN, the zeros of all rows are NaN.
        for p in tables:
            p.grad = p.grad.to_dense()
        kinds = by_backend([p.grad for p in parameters if p.grad is not None], norm_type)
    if may_change(factor):
        for backend, members in kinds:
            values = [grad._values() if grad.is_sparse else grad for grad in members]
            if backend == "torch":
                torch._foreach_mul_(values, factor.to(values[0].device))
            else:
                scale_(values, factor.to(values[0].device), backend)
    return norm.to(reduce(torch.promote_types, (grad.dtype for grad in grads)))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, a float64 scalar beside it; NaN for NaN, as in torch."""
    return (float(max_norm) / (norm.double() + 1e-6)).clamp(max=1.0)


def by_backend(grads: list[Tensor], norm_type: float = 2.0) -> list[tuple[str, list[Tensor]]]:
    """The gradients, with the backend that serves their norm: one entry per device, dtype and kind of layout."""
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        dense = grad._values() if grad.is_sparse else grad
        several = grad.is_sparse and grad.sparse_dim() != 1
        not_plain = tuple(dispatch.not_plain(dense))
        contiguous = bool(not_plain) or dense.is_contiguous()
        kinds.setdefault((grad.is_sparse, several, contiguous, not_plain, grad.device, grad.dtype), []).append(grad)
    result = []
    for (sparse, several, contiguous, not_plain, *_), members in kinds.items():
        used = {"norm_type": float(norm_type) != 2, "several sparse dimensions": several}
        used["non-contiguous tensors"] = not contiguous
        used |= dict.fromkeys(not_plain, True)
        first = members[0]._values() if sparse else members[0]
        op = "sparse_grad_norm" if sparse else "grad_norm"
        backend = dispatch.pick(op, first, options=[name for name, on in used.items() if on])
        result.append((backend, members))
    return result


def total_norm(kinds: list[tuple[str, list[Tensor]]], norm_type: float = 2.0) -> Tensor:
    """The norm of gradients that :func:`by_backend` sorted, as a float64 scalar on the first one's device."""
    if float(norm_type) <= 0 and any(grad.is_sparse for _, members in kinds for grad in members):
        raise ValueError(f"norm_type: got {norm_type}; sparse gradients, which are zero elsewhere, need a positive one")
    norms = [norm.to(kinds[0][1][0].device) for kind in kinds for norm in _norms(*kind, norm_type)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), float(norm_type))


def _norms(backend: str, grads: list[Tensor], norm_type: float) -> list[Tensor]:
    if backend != "torch" and grads[0].is_sparse:
        flat = (grad._values().view(grad._nnz(), math.prod(grad.shape[1:])) for grad in grads)
        rows = zip((grad._indices()[0] for grad in grads), flat, (len(grad) for grad in grads), strict=True)
        return [sparse_grad_norm(*row, backend) for row in rows]
    if backend != "torch":
        return [grad_norm(grads, backend)]
    # Entries of one index are parts of one sum.
    values = [grad.coalesce()._values() if grad.is_sparse else grad for grad in grads]
    norm = get_total_norm(values, norm_type)
    # That of a DTensor may be a sum that is not taken yet.
    return [(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).double()]
