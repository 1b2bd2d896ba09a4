"""Torch ops: schema, fake and autograd of each, one file per op.

An op here works on canonical arguments (contiguous, one layout, per-row results) and takes the backend as its last
argument, so that a backward runs where its forward ran. Everything a user may write is in ``llmkern.functional``.
"""

from .cross_entropy import cross_entropy
from .embedding import embedding
from .embedding_bag import embedding_bag, stands_in_for_torch
from .linear import linear
from .mse_loss import mse_loss
from .optim import adam_step
from .rnn import rnn

__all__ = [
    "adam_step",
    "cross_entropy",
    "embedding",
    "embedding_bag",
    "linear",
    "mse_loss",
    "rnn",
    "stands_in_for_torch",
]
