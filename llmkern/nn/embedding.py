"""``Embedding`` and ``EmbeddingBag``: torch's modules over ``llmkern.functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn
from torch import Tensor

from .. import functional as F
from ..functional.embedding import RowParameter
from ._deploy import Deployable


class Embedding(torch.nn.Embedding, Deployable):
    """A lookup table; see :class:`torch.nn.Embedding`. Same arguments, parameters and ``from_pretrained``.

    ``row_grad=True`` (default: ``False``) gives ``weight`` a gradient of the rows that a batch looked up, as a sparse
    tensor, and lets the optimizers of ``llmkern.optim`` leave the others alone until they are next looked up or read:
    a step costs what the batch costs, whatever the size of the table. The results are those of the dense optimizer,
    to the rounding of fp32 (for fp32 with SGD, Adam without L2 penalty, AdamW) or to the last bit;
    ``row_grad="replay"`` asks for the bits always. Not with ``max_norm`` or ``scale_grad_by_freq``. ``sparse`` is
    ``True`` then, as long as ``weight`` is the parameter that this made. Under ``torch.compile(fullgraph=True)`` the
    gradient is dense, and so is the step. docs/differences.md lists the few readers that find rows behind.
    """

    _sparse: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        row_grad: bool | Literal["replay"] = False,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze, device, dtype)
        super().__init__(num_embeddings, embedding_dim, *options)
        if row_grad not in (False, True, "replay"):
            raise ValueError(f"row_grad: got {row_grad!r}, expected False, True or 'replay'")
        if row_grad and (max_norm is not None or scale_grad_by_freq):
            raise ValueError(
                "row_grad: got max_norm or scale_grad_by_freq, whose gradients or writes are not of rows alone"
            )
        if row_grad:
            RowParameter.adopt(self.weight, replay=row_grad == "replay")

    @property
    def sparse(self) -> bool:
        return self._sparse or issubclass(type(self._parameters.get("weight")), RowParameter)

    @sparse.setter
    def sparse(self, value: bool) -> None:
        # Twice: compilers up to torch 2.10 take what is in __dict__ under the property's name for the property, and
        # torch's class, which a layer becomes when it is quantised, finds it there.
        vars(self).update(sparse=value, _sparse=value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's class and earlier versions have saved one of them.
        super().__setstate__({"_sparse": state.get("sparse", False), **state})

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, *args: Any, **kwargs: Any) -> Embedding:
        """See :meth:`torch.nn.Embedding.from_pretrained`."""
        rows = issubclass(type(embeddings), RowParameter)
        return super().from_pretrained(embeddings.data if rows else embeddings, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding:
        before = self._parameters.get("weight")
        super()._apply(fn, recurse)
        # torch makes another parameter where it cannot give this one other memory: from the meta device, say.
        if isinstance(before, RowParameter) and type(self.weight) is torch.nn.Parameter:
            RowParameter.adopt(self.weight, before.replay)
        return self

    def __prepare_scriptable__(self) -> Any:
        twin = super().__prepare_scriptable__()
        if twin is not self:
            twin.sparse, _ = self.sparse, vars(twin).pop("_sparse")
        if isinstance(self.weight, RowParameter):
            self.weight.expose()
        return twin

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", row_grad=True" if issubclass(type(self.weight), RowParameter) else "")


class EmbeddingBag(torch.nn.EmbeddingBag, Deployable):
    """Sums, means or maxes of bags; see :class:`torch.nn.EmbeddingBag`.

    Same arguments, parameters and ``from_pretrained``. ``per_sample_weights`` may also go with a mean: the sum of the
    weighted rows, divided by their number.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
