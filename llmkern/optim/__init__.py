"""``torch.optim`` with kernels: the same classes, arguments and ``state_dict``; other names are torch's own.

``clip_grad_norm_`` is that of ``torch.nn.utils``.
"""

from typing import Any

import torch.optim

from .._torch_tree import mount
from ..functional import clip_grad_norm_
from ._in_backward import InBackward, in_backward
from ._rows import prepare
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .sgd import SGD
from .sparse import LazyAdam, RowWiseAdagrad, SparseAdam

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "InBackward",
    "LazyAdam",
    "RowWiseAdagrad",
    "SparseAdam",
    "clip_grad_norm_",
    "in_backward",
    "prepare",
]

_classes = [name for name in torch.optim.__all__ if name in __all__]
mount(__name__, torch.optim, {getattr(torch.optim, name): globals()[name] for name in _classes})


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})
