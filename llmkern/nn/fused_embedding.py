"""``FusedEmbedding``: the input layer of a transformer as one module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn
from torch import Tensor
from torch.nn.parameter import Parameter

from .. import functional as F
from ._deploy import Deployable


class FusedEmbedding(torch.nn.Module, Deployable):
    """Token + position + token type, norm and dropout in one pass; see :func:`llmkern.functional.fused_embedding`.

    Args:
        num_embeddings: V, the number of tokens.
        embedding_dim: D.
        padding_idx: a row of ``weight`` that begins at zero and gets no gradient. Default: none.
        num_positions: P, the longest sequence. Default: no positions.
        num_token_types: K. Default: no token types.
        scale: a factor of the token's row alone. Default: 1.
        norm: ``"layer"``, ``"rms"`` or ``None``. Default: ``None``.
        eps: as of :class:`torch.nn.LayerNorm`. Default: 1e-5.
        elementwise_affine: whether the norm has weights. Default: ``True``.
        bias: whether a layer norm has a bias. Default: ``True``.
        dropout: the probability of an element to be zeroed in training. Default: 0.
        scale_grad_by_freq: divides a row's gradient by its count in the batch. Default: ``False``.

    Parameters, ``None`` where there is no such part:
        weight ``(V, D)``, position_weight ``(P, D)``, token_type_weight ``(K, D)``: as of :class:`torch.nn.Embedding`.
        norm_weight ``(D)``, norm_bias ``(D)``: ones and zeros. An rms norm has no bias.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        num_positions: int | None = None,
        num_token_types: int | None = None,
        scale: float = 1.0,
        norm: str | None = None,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        scale_grad_by_freq: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: got {padding_idx}, expected a row of {num_embeddings}")
        if norm not in (None, "layer", "rms"):
            raise ValueError(f"norm: got {norm!r}, expected 'layer', 'rms' or None")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        self.num_positions, self.num_token_types = num_positions, num_token_types
        self.scale, self.norm, self.eps, self.dropout = scale, norm, eps, dropout
        self.scale_grad_by_freq = scale_grad_by_freq
        affine = norm is not None and elementwise_affine
        for name, shape in (
            ("weight", (num_embeddings, embedding_dim)),
            ("position_weight", None if num_positions is None else (num_positions, embedding_dim)),
            ("token_type_weight", None if num_token_types is None else (num_token_types, embedding_dim)),
            ("norm_weight", (embedding_dim,) if affine else None),
            ("norm_bias", (embedding_dim,) if affine and bias and norm == "layer" else None),
        ):
            made = None if shape is None else Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, made)
        self.reset_parameters()

    weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def reset_parameters(self) -> None:
        """Tables from the normal distribution, as torch's embedding; the norm is the identity."""
        for table in (self.weight, self.position_weight, self.token_type_weight):
            if table is not None:
                torch.nn.init.normal_(table)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)
        if self.norm_weight is not None:
            torch.nn.init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            torch.nn.init.zeros_(self.norm_bias)

    def forward(self, input: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """``(*, L)`` to ``(*, L, D)``."""
        return F.fused_embedding(
            input,
            self.weight,
            self.position_weight,
            positions,
            self.token_type_weight,
            token_types,
            scale=self.scale,
            norm=self.norm,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
            dropout=self.dropout,
            training=self.training,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )

    def extra_repr(self) -> str:
        neutral = {"padding_idx": None, "num_positions": None, "num_token_types": None, "scale": 1.0, "norm": None}
        neutral |= {"dropout": 0.0, "scale_grad_by_freq": False}
        given = [f"{name}={value!r}" for name in neutral if (value := getattr(self, name)) != neutral[name]]
        return ", ".join([str(self.num_embeddings), str(self.embedding_dim), *given])
