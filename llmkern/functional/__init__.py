"""``torch.nn.functional``, with kernels: the same names, arguments and results; other names are torch's own.

Functions check and normalise their arguments once, pick a backend, and reduce; malformed calls are handed to torch,
so that errors are torch's, word for word.
"""

from typing import Any

import torch.nn.functional

from ._losses import CrossEntropyOutput as CrossEntropyOutput
from .cross_entropy import cross_entropy as cross_entropy
from .cross_entropy import nll_loss as nll_loss
from .dropout import dropout as dropout
from .embedding import embedding as embedding
from .embedding_bag import embedding_bag as embedding_bag
from .fused_embedding import fused_embedding as fused_embedding
from .grad_norm import clip_grad_norm_ as clip_grad_norm_
from .layer_norm import layer_norm as layer_norm
from .layer_norm import rms_norm as rms_norm
from .linear import linear as linear
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .mse_loss import mse_loss as mse_loss
from .quantized_embedding import quantize_rows as quantize_rows
from .quantized_embedding import quantized_embedding as quantized_embedding
from .rnn import gru as gru
from .rnn import gru_cell as gru_cell
from .rnn import lstm as lstm
from .rnn import lstm_cell as lstm_cell
from .rnn import rnn_relu as rnn_relu
from .rnn import rnn_relu_cell as rnn_relu_cell
from .rnn import rnn_tanh as rnn_tanh
from .rnn import rnn_tanh_cell as rnn_tanh_cell
from .rnn import slstm as slstm

# What is imported above.
__all__ = sorted(name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__))


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})
