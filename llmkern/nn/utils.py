"""``torch.nn.utils`` with a kernel for ``clip_grad_norm_``; every other name is torch's own."""

from typing import Any

import torch.nn.utils

from ..functional import clip_grad_norm_

__all__ = ["clip_grad_norm_"]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.utils, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.utils)})
