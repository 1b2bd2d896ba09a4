"""Arguments that travel together, from ``functional`` to the kernels: what each is, and its shape, is said here once.

An op's schema names a group where its arguments stand one after the other (``ops/_library.py``).
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from torch import Tensor


class RNNInputs(NamedTuple):
    """One recurrent layer and direction: T steps of B sequences, hidden size H, G gates, a cell state of C columns; all
    contiguous. Those up to ``norms`` may have a gradient."""

    x: Tensor  # (T, B, I); (B, T, I) with batch_first; (tokens, I) with batch_sizes
    hx: Tensor  # (B, H); (B, P) with a projection
    cx: Tensor | None  # (B, C): of lstm and slstm
    weight_ih: Tensor  # (G H, I)
    weight_hh: Tensor  # (G H, H); of fewer columns, the blocks of a diagonal
    bias_ih: Tensor | None  # (G H)
    bias_hh: Tensor | None  # (G H)
    weight_hr: Tensor | None = None  # (P, H)
    peephole: Tensor | None = None  # (3, H)
    norms: Tensor | None = None  # weights of the norms of W x and U h, (G H) each; lstm: weight and bias of that of c
    batch_sizes: Tensor | None = None  # (T) of int64: sequences that have each step, on the CPU
    seed: Tensor | None = None  # () of int64, on the CPU: what zoneout is drawn from; None: nothing is drawn


RNN_PRIMALS = RNNInputs._fields.index("batch_sizes")


class RNNSaved(NamedTuple):
    """What a forward gives its backward, beside its inputs. What is not needed is empty."""

    y: Tensor  # as x, with P in place of I
    gates: Tensor  # as y, with as many hidden sizes as the mode saves (llmkern/_facts.py)
    cells: Tensor  # c after every step, as y, with C columns, in fp32 (fp64 for fp64)
    normed: Tensor  # of layer norms: normalised sums, and each row's deviations


class RNNCotangents(NamedTuple):
    dy: Tensor
    dhy: Tensor
    dcy: Tensor | None
    dcells: Tensor | None


class RNNOptions(NamedTuple):
    """What a layer does; see :mod:`llmkern.reference.rnn`."""

    mode: str
    reverse: bool = False
    batch_first: bool = False
    clip: float = 0.0
    zoneout: float = 0.0
    zoneout_cell: float = 0.0


class FusedEmbeddingInputs(NamedTuple):
    """Tables and norm of N tokens; all contiguous. Those up to ``indices`` may have a gradient."""

    weight: Tensor  # (V, D)
    position_weight: Tensor | None  # (P, D)
    token_type_weight: Tensor | None  # (K, D)
    norm_weight: Tensor | None  # (D)
    norm_bias: Tensor | None  # (D)
    indices: Tensor  # (N)
    positions: Tensor | None  # rows of position_weight: N, or fewer that are repeated
    token_types: Tensor | None  # rows of token_type_weight, likewise

    # No property: the compiler of torch 2.10 knows none of a tuple.
    def tables(self) -> tuple[tuple[str, Tensor | None, Tensor | None], ...]:
        """Each table's name, the table, and its rows."""
        return (
            ("weight", self.weight, self.indices),
            ("position_weight", self.position_weight, self.positions),
            ("token_type_weight", self.token_type_weight, self.token_types),
        )


FUSED_EMBEDDING_PRIMALS = FusedEmbeddingInputs._fields.index("indices")


class FusedEmbeddingOptions(NamedTuple):
    """What is done to the rows; see :mod:`llmkern.reference.fused_embedding`."""

    scale: float = 1.0
    norm: str = "none"
    eps: float = 1e-5
    p: float = 0.0
    seed: int = 0
    padding_idx: int = -1
    scale_grad_by_freq: bool = False


class LossInputs(NamedTuple):
    """Of N rows; all contiguous. Those up to ``weight`` may have a gradient."""

    x: Tensor  # logits (N, V) or (N, V, D); (N, H) before a linear layer
    linear_weight: Tensor | None  # (V, H)
    linear_bias: Tensor | None  # (V)
    target: Tensor  # int64 indices (N) or (N, D), or probabilities of the logits' shape
    weight: Tensor | None  # (V), one for each class


LOSS_PRIMALS = LossInputs._fields.index("weight")


class LossOptions(NamedTuple):
    """Of cross-entropy; see :mod:`llmkern.reference.cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0


class LazyTable(NamedTuple):
    """A table whose rows are stepped when they are next looked up, and the optimizer's rule."""

    param: Tensor  # (V, D)
    states: list[Tensor]  # of its shape, in the order of :mod:`llmkern.reference.optim`
    applied: Tensor  # (V) of int32: how many of the logged steps a row has had
    log: Tensor  # (capacity, 31) of float64: a record of each step; it begins with the numbers of RowStep
    logged: int  # how many steps the log has
    kind: str  # "adam", "sgd" or "adagrad"
    decoupled: bool
    maximize: bool
    nesterov: bool
    closed: bool  # many steps without a gradient are computed at once, to the rounding of fp32


_ALL = (
    *(RNNInputs, RNNSaved, RNNCotangents, RNNOptions),
    *(FusedEmbeddingInputs, FusedEmbeddingOptions),
    LossOptions,
    LazyTable,
)
_TYPES = {
    Tensor: "Tensor{}",
    Tensor | None: "Tensor{}?",
    list[Tensor]: "Tensor{}[]",
    str: "str",
    bool: "bool",
    float: "float",
    int: "int",
}
# A group by its name in a schema; with "!" after it, one whose tensors are written to.
GROUPS = {group.__name__ + written: group for group in _ALL for written in ("", "!")}


def schema_of(name: str) -> str:
    """The fields of a group as a schema has them."""
    written = [f"({letter}!)" if name.endswith("!") else "" for letter in "abcdefghijklmnop"]
    fields = zip(get_type_hints(GROUPS[name]).items(), written, strict=False)
    return ", ".join(f"{_TYPES[kind].format(mark)} {field}" for (field, kind), mark in fields)
