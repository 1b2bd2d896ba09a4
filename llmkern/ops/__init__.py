"""Torch ops: schema, fake and autograd of each, one file per op: ``from ..ops.linear import linear``.

An op here works on canonical arguments (contiguous, one layout, per-row results) and takes the backend as its last
argument, so that a backward runs where its forward ran. Everything a user may write is in ``llmkern.functional``.
The names of the package itself are what several files above it need.
"""

import importlib
import pkgutil

from .._groups import FusedEmbeddingInputs, FusedEmbeddingOptions, LossInputs, LossOptions, RNNInputs, RNNOptions
from ..reference._random import draw_seed, drawn_seed, shifted
from ._autograd import as_shape, capturing, differentiating, seed_freezes, traced
from ._flops import count_flops
from ._losses import LossRows, loss_rows
from ._rnn_chunks import rnn_in_chunks
from ._row_graphs import trace_row_tables
from ._row_tensors import ROW_LOCK, RowParameter, RowState, RowTensor
from .row_optim import RowRule, RowStep, RowTable, same_memory

__all__ = [
    "ROW_LOCK",
    "FusedEmbeddingInputs",
    "FusedEmbeddingOptions",
    "LossInputs",
    "LossOptions",
    "LossRows",
    "RNNInputs",
    "RNNOptions",
    "RowParameter",
    "RowRule",
    "RowState",
    "RowStep",
    "RowTable",
    "RowTensor",
    "as_shape",
    "capturing",
    "differentiating",
    "draw_seed",
    "drawn_seed",
    "loss_rows",
    "rnn_in_chunks",
    "same_memory",
    "seed_freezes",
    "shifted",
    "traced",
]

# A file defines its ops when it is imported.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
count_flops()
trace_row_tables()
