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
from .cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .cross_entropy import NLLLoss as NLLLoss
from .dropout import Dropout as Dropout
from .embedding import Embedding as Embedding
from .embedding import EmbeddingBag as EmbeddingBag
from .fused_embedding import FusedEmbedding as FusedEmbedding
from .layer_norm import LayerNorm as LayerNorm
from .layer_norm import RMSNorm as RMSNorm
from .linear import Linear as Linear
from .linear_cross_entropy import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from .mse_loss import MSELoss as MSELoss
from .quantized_embedding import QuantizedEmbedding as QuantizedEmbedding
from .rnn import GRU as GRU
from .rnn import LSTM as LSTM
from .rnn import RNN as RNN
from .rnn import sLSTM as sLSTM
from .rnn_cell import GRUCell as GRUCell
from .rnn_cell import LSTMCell as LSTMCell
from .rnn_cell import RNNCell as RNNCell

# The classes that are imported above, and the two modules.
_ours = {name for name, value in globals().items() if isinstance(value, type) and value.__module__.startswith(__name__)}
__all__ = [*sorted(_ours), "functional", "utils"]

sys.modules[f"{__name__}.functional"] = functional
_classes = [name for name in torch.nn.modules.__all__ if name in __all__ and hasattr(torch.nn.modules, name)]
_replaced = {getattr(torch.nn.modules, name): globals()[name] for name in _classes}
mount(__name__, torch.nn, {torch.nn.utils.clip_grad.clip_grad_norm_: functional.clip_grad_norm_, **_replaced})
convert_ours(_replaced)


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
