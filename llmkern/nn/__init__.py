"""``torch.nn`` with kernels: ``import llmkern.nn as nn`` is the only change a model needs.

The classes below are torch's, constructor for constructor, and keep its ``state_dict``; every other name, and every
submodule, is torch's own, but for what stands in for these.
"""

import sys
from typing import Any

import torch.nn

from .. import functional
from .._torch_tree import mount
from . import utils
from ._quantization import convert_ours
from .cross_entropy import CrossEntropyLoss, NLLLoss
from .dropout import Dropout
from .embedding import Embedding, EmbeddingBag
from .fused_embedding import FusedEmbedding
from .linear import Linear
from .linear_cross_entropy import LinearCrossEntropyLoss
from .mse_loss import MSELoss
from .quantized_embedding import QuantizedEmbedding
from .rnn import GRU, LSTM, RNN, sLSTM
from .rnn_cell import GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "EmbeddingBag",
    "FusedEmbedding",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "NLLLoss",
    "QuantizedEmbedding",
    "RNNCell",
    "functional",
    "sLSTM",
    "utils",
]

sys.modules[f"{__name__}.functional"] = functional
_classes = [name for name in torch.nn.modules.__all__ if name in __all__ and hasattr(torch.nn.modules, name)]
_replaced = {getattr(torch.nn.modules, name): globals()[name] for name in _classes}
mount(__name__, torch.nn, {torch.nn.utils.clip_grad.clip_grad_norm_: functional.clip_grad_norm_, **_replaced})
convert_ours(_replaced)


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
