"""Torch ops: schema, fake and autograd of each, one file per op.

An op here works on canonical arguments (contiguous, one layout, per-row results) and takes the backend as its last
argument, so that a backward runs where its forward ran. Everything a user may write is in ``llmkern.functional``.
"""

from .._groups import FusedEmbeddingInputs, FusedEmbeddingOptions, LossOptions, RNNInputs, RNNOptions
from ..reference._random import draw_seed, drawn_seed, shifted
from ._autograd import as_shape, capturing, differentiating, seed_freezes, traced
from ._flops import count_flops
from ._losses import Rows
from ._rnn_chunks import rnn_in_chunks
from ._row_graphs import trace_row_tables
from ._row_tensors import ROW_LOCK, RowParameter, RowState, RowTensor
from .cross_entropy import cross_entropy
from .dropout import dropout
from .embedding import embedding, renormalise
from .embedding_bag import BagIndexError, embedding_bag
from .fused_embedding import fused_embedding
from .grad_norm import grad_norm, may_change, scale_
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mse_loss import mse_loss
from .optim import adagrad_step, adam_step, advance, sgd_step
from .quantized_embedding import quantize_rows, quantized_embedding
from .rnn import rnn
from .row_optim import RowRule, RowStep, RowTable, same_memory
from .sparse_optim import (
    rowwise_adagrad_step,
    sparse_adagrad_step,
    sparse_adam_step,
    sparse_grad_norm,
    sparse_sgd_step,
)

__all__ = [
    "ROW_LOCK",
    "BagIndexError",
    "FusedEmbeddingInputs",
    "FusedEmbeddingOptions",
    "LossOptions",
    "RNNInputs",
    "RNNOptions",
    "RowParameter",
    "RowRule",
    "RowState",
    "RowStep",
    "RowTable",
    "RowTensor",
    "Rows",
    "adagrad_step",
    "adam_step",
    "advance",
    "as_shape",
    "capturing",
    "cross_entropy",
    "differentiating",
    "draw_seed",
    "drawn_seed",
    "dropout",
    "embedding",
    "embedding_bag",
    "fused_embedding",
    "grad_norm",
    "linear",
    "linear_cross_entropy",
    "may_change",
    "mse_loss",
    "quantize_rows",
    "quantized_embedding",
    "renormalise",
    "rnn",
    "rnn_in_chunks",
    "rowwise_adagrad_step",
    "same_memory",
    "scale_",
    "seed_freezes",
    "sgd_step",
    "shifted",
    "sparse_adagrad_step",
    "sparse_adam_step",
    "sparse_grad_norm",
    "sparse_sgd_step",
    "traced",
]

count_flops()
trace_row_tables()
