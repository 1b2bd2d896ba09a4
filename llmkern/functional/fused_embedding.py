"""The input layer of a transformer as one function: embedding + positions + token types, norm, dropout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import dispatch, ops
from .._torch import F
from ..ops.fused_embedding import fused_embedding as fused_embedding_op
from ._overrides import overridden
from .embedding import INDEX_DTYPES, row_number

NORMS = (None, "layer", "rms")


def fused_embedding(
    input: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    token_types: Tensor | None = None,
    *,
    scale: float = 1.0,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = True,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """``dropout(norm(scale * weight[input] + position_weight[positions] + token_type_weight[token_types]))``.

    Every part but the lookup is left out unless it is asked for: GPT-2 has positions and dropout, BERT all but the
    scale, the first transformer ``scale`` = sqrt(D), positions and dropout. One pass forward and, for the gradient at
    the sum, one backward; neither the sum nor the mask is stored.

    Args:
        input: token ids ``(*, L)``, int32 or int64, each in ``[0, V)``.
        weight: table ``(V, D)``.
        position_weight: table ``(P, D)`` of positions. Default: none.
        positions: rows of it, of any shape that broadcasts to ``input``'s. Default: 0 .. L-1 along the last dimension.
        token_type_weight: table ``(K, D)`` of token types (segments). Default: none.
        token_types: rows of it, of any shape that broadcasts to ``input``'s. Default: all 0.
        scale: a factor of the token's row alone. Default: 1.
        norm: ``"layer"`` (:func:`torch.nn.functional.layer_norm`), ``"rms"`` (:func:`torch.nn.functional.rms_norm`) or
            ``None``, over the last dimension. Default: ``None``.
        norm_weight, norm_bias: ``(D)`` each, applied after the norm. Default: none.
        eps: added to the variance, or to the mean square. Default: 1e-5.
        dropout: the probability of an element to be zeroed; the others are scaled by 1 / (1 - dropout). Default: 0.
        training: whether dropout is applied. Default: ``True``.
        padding_idx: a row of ``weight`` that gets no gradient; negative counts from the end. Default: none.
        scale_grad_by_freq: divides a row's gradient by its count in the batch. Default: ``False``.

    Returns:
        ``(*, L, D)``, of ``weight``'s dtype. A kernel rounds once, and drops what :func:`llmkern.functional.dropout`
        drops; calls too small for it take torch's functions one by one.

    Raises:
        IndexError: "index out of range in self", for positions and token types after their name.
        ValueError: if the shapes of the operands do not fit, or ``dropout`` is no probability.

    With a norm the backward reads the tables again, so that they may not change in place before it.
    """
    asked = (input, weight, position_weight, positions, token_type_weight, token_types, norm_weight, norm_bias)
    if overridden("fused_embedding", *asked):
        return handle_torch_function(
            fused_embedding,
            asked,
            *asked[:6],
            scale=scale,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            dropout=dropout,
            training=training,
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
        )
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, expected 'layer', 'rms' or None")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
    if norm is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError("norm_weight, norm_bias: got a tensor without a norm; expected norm='layer' or norm='rms'")
    p = float(dropout) if training else 0.0
    operands = (weight, position_weight, token_type_weight, norm_weight, norm_bias)
    not_plain = dispatch.not_plain(input, *operands, positions, token_types)
    served = weight.dim() == 2 and input.dtype in INDEX_DTYPES and input.device == weight.device
    if padding_idx is not None:
        served = served and -weight.shape[0] <= padding_idx < weight.shape[0]
    _check_operands(weight, position_weight, token_type_weight, norm_weight, norm_bias)
    positions = _rows("position", input, position_weight, positions)
    token_types = _rows("token_type", input, token_type_weight, token_types)
    backend = "torch"
    if served:
        # As in `dropout`: a seed is a number.
        options = [*not_plain, "traced dropout"] if p > 0 and ops.seed_freezes() else not_plain
        floats = [t for t in operands if t is not None]
        work = {"elements": input.numel() * weight.shape[1], "dropout": p > 0}
        does = "torch's functions one by one"
        backend = dispatch.pick("fused_embedding", *floats, options=options, torch_does=does, **work)
    if backend == "torch":
        x = F.embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
        return _compose(x, operands, positions, token_types, scale, norm, eps, p)
    seed = ops.draw_seed() if p > 0 else 0
    steps = ops.FusedEmbeddingOptions(
        float(scale), norm or "none", float(eps), p, seed, row_number(padding_idx, weight), scale_grad_by_freq
    )
    tensors = [None if t is None else t.contiguous() for t in operands]
    tensors += [input.reshape(-1).contiguous(), _repeated(positions, input), _repeated(token_types, input)]
    out = fused_embedding_op(ops.FusedEmbeddingInputs._make(tensors), steps, backend)
    return ops.as_shape(out, (*input.shape, weight.shape[1]))


def _check_operands(
    weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    D = weight.shape[-1]
    for name, table in (("position_weight", position_weight), ("token_type_weight", token_type_weight)):
        if table is not None and (table.dim() != 2 or table.shape[1] != D):
            raise ValueError(f"{name}: got shape {tuple(table.shape)}, expected (rows, {D}) as weight has {D} columns")
    for name, row in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if row is not None and row.shape != (D,):
            raise ValueError(f"{name}: got shape {tuple(row.shape)}, expected ({D},) as weight has {D} columns")


def _rows(name: str, input: Tensor, table: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Rows of ``table`` for the tokens of ``input``, in a shape that broadcasts to theirs; the default where None."""
    plural = f"{name}s"
    if table is None:
        if rows is not None:
            raise ValueError(f"{plural}: got a tensor without {name}_weight; expected the table that it looks up in")
        return None
    if rows is None:
        needed = input.shape[-1] if name == "position" and input.dim() > 0 else 1
        if needed > table.shape[0] and input.numel() > 0:
            raise ValueError(
                f"{name}_weight: got {table.shape[0]} rows, expected at least {needed} for input of shape "
                f"{tuple(input.shape)}; give a longer table, or {plural}"
            )
        rows = torch.arange(needed, device=input.device)
        return rows if input.dim() > 0 else rows[0]
    if rows.dtype not in INDEX_DTYPES:
        raise ValueError(f"{plural}: got {rows.dtype}, expected torch.int64 or torch.int32")
    fits = rows.dim() <= input.dim() and all(
        n in (1, m) for n, m in zip(rows.shape[::-1], input.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{plural}: got shape {tuple(rows.shape)}, expected one that broadcasts to input's, {tuple(input.shape)}"
        )
    return rows


def _repeated(rows: Tensor | None, input: Tensor) -> Tensor | None:
    """Rows flat, as the op takes them: for all tokens, or for so many that repeating them gives all."""
    if rows is None:
        return None
    repeats = rows.numel() == 1 or rows.shape == input.shape[input.dim() - rows.dim() :]
    return (rows if repeats else rows.expand(input.shape)).reshape(-1).contiguous()


def _compose(
    x: Tensor,
    operands: tuple[Tensor | None, ...],
    positions: Tensor | None,
    token_types: Tensor | None,
    scale: float,
    norm: str | None,
    eps: float,
    p: float,
) -> Tensor:
    """The same by torch's functions, one after the other."""
    _, position_weight, token_type_weight, norm_weight, norm_bias = operands
    if scale != 1:
        x = x * scale
    for table, rows in ((position_weight, positions), (token_type_weight, token_types)):
        if table is not None and rows is not None:
            x = x + F.embedding(rows, table)
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    elif norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], norm_weight, eps)
        x = x if norm_bias is None else x + norm_bias
    return F.dropout(x, p) if p > 0 else x
