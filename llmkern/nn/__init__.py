"""``torch.nn`` with kernels: ``import llmkern.nn as nn`` is the only change a model needs.

The classes below are torch's, constructor for constructor, and keep its ``state_dict``; every other name, and every
submodule (``nn.functional`` and ``nn.utils`` apart), is torch's own.
"""

import sys
from typing import Any

import torch.nn

from .. import functional
from . import utils
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

# So that `import llmkern.nn.functional as F` and `from llmkern.nn.utils.rnn import ...` work as with torch.
sys.modules[f"{__name__}.functional"] = functional
for _name in ("init", "parameter", "utils.rnn", "utils.parametrizations", "modules", "parallel"):
    __import__(f"torch.nn.{_name}")
    sys.modules[f"{__name__}.{_name}"] = sys.modules[f"torch.nn.{_name}"]
del _name


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
