"""Token + position + token type, norm and dropout, as the input layer of a transformer has them."""

from __future__ import annotations

from torch import Tensor

from .._groups import FusedEmbeddingInputs, FusedEmbeddingOptions
from .dropout import dropout
from .embedding import embedding_rows


def fused_embedding(inputs: FusedEmbeddingInputs, options: FusedEmbeddingOptions) -> Tensor:
    """``dropout(norm(scale * weight[indices] + position_weight[positions] + token_type_weight[token_types]))``: (N, D).

    ``norm``: "layer" (Ba, Kiros and Hinton, 2016), "rms" (Zhang and Sennrich, 2019) or "none". Padding and frequency
    act on the gradient of ``weight`` alone; ``padding_idx`` < 0: none. Rounded once, at the end.

    Raises:
        IndexError: if an index is outside its table.
    """
    scale, norm, eps, p, seed, padding_idx, scale_grad_by_freq = options
    x = embedding_rows(inputs.weight, inputs.indices, padding_idx, scale_grad_by_freq) * scale
    for _, table, rows in inputs.tables()[1:]:
        if table is not None and rows is not None:
            repeats = inputs.indices.numel() // max(1, rows.numel())
            x = x + embedding_rows(table, rows.repeat(repeats), -1, False)
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm != "none":
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    if inputs.norm_weight is not None:
        x = x * inputs.norm_weight
    if inputs.norm_bias is not None:
        x = x + inputs.norm_bias
    return (dropout(x, p, seed) if p > 0 else x).to(inputs.weight.dtype)
