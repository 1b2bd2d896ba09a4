"""``torch.optim`` with kernels: the same classes, arguments and ``state_dict``; other names are torch's own."""

import importlib
import sys
from typing import Any

import torch.optim

from .adam import Adam, AdamW
from .sgd import SGD, Adagrad

__all__ = ["SGD", "Adagrad", "Adam", "AdamW"]

for _name in ("lr_scheduler", "swa_utils"):
    sys.modules[f"{__name__}.{_name}"] = importlib.import_module(f"torch.optim.{_name}")
del _name


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})
