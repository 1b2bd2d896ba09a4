"""``torch.nn.functional``, with kernels: the same names, arguments and results; other names are torch's own.

Functions check and normalise their arguments once, pick a backend, and reduce; malformed calls are handed to torch,
so that errors are torch's, word for word.
"""

from typing import Any

import torch.nn.functional

from ._losses import CrossEntropyOutput
from .cross_entropy import cross_entropy, nll_loss
from .dropout import dropout
from .embedding import embedding
from .embedding_bag import embedding_bag
from .fused_embedding import fused_embedding
from .grad_norm import clip_grad_norm_
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mse_loss import mse_loss
from .quantized_embedding import quantize_rows, quantized_embedding
from .rnn import gru, gru_cell, lstm, lstm_cell, rnn_relu, rnn_relu_cell, rnn_tanh, rnn_tanh_cell, slstm

__all__ = [
    "CrossEntropyOutput",
    "clip_grad_norm_",
    "cross_entropy",
    "dropout",
    "embedding",
    "embedding_bag",
    "fused_embedding",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "mse_loss",
    "nll_loss",
    "quantize_rows",
    "quantized_embedding",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "slstm",
]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})
