"""Token + position + token type, norm and dropout, as the input layer of a transformer has them."""

from __future__ import annotations

from torch import Tensor

from .dropout import dropout
from .embedding import embedding_rows


def fused_embedding(
    weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    indices: Tensor,
    positions: Tensor | None,
    token_types: Tensor | None,
    scale: float = 1.0,
    norm: str = "none",
    eps: float = 1e-5,
    p: float = 0.0,
    seed: int = 0,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """``dropout(norm(scale * weight[indices] + position_weight[positions] + token_type_weight[token_types]))``: (N, D).

    ``indices`` (N); ``positions`` and ``token_types`` of N elements, or of fewer that are repeated. ``norm``: "layer"
    (Ba, Kiros and Hinton, 2016), "rms" (Zhang and Sennrich, 2019) or "none". Padding and frequency act on the
    gradient of ``weight`` alone; ``padding_idx`` < 0: none. Rounded once, at the end.

    Raises:
        IndexError: if an index is outside its table.
    """
    x = embedding_rows(weight, indices, padding_idx, scale_grad_by_freq) * scale
    for table, rows in ((position_weight, positions), (token_type_weight, token_types)):
        if table is not None and rows is not None:
            repeats = indices.numel() // max(1, rows.numel())
            x = x + embedding_rows(table, rows.repeat(repeats), -1, False)
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm != "none":
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        x = x * norm_weight
    if norm_bias is not None:
        x = x + norm_bias
    return (dropout(x, p, seed) if p > 0 else x).to(weight.dtype)
