"""torch's functions as they are when llmkern is imported, for the calls that torch serves.

Closed code is patched by ``torch.nn.functional.linear = llmkern.functional.linear``: a fallback that looked the name up
in torch when it is called would then find itself.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional
import torch.nn.utils

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CALLED = (*_RECURRENT, *(f"{mode}_cell" for mode in _RECURRENT), "dropout", "dropout_")

if TYPE_CHECKING:
    import torch._VF as VF
    import torch.nn.functional as F
else:
    F, VF = ModuleType("torch.nn.functional"), ModuleType("torch._VF")
    vars(F).update(vars(torch.nn.functional))
    vars(VF).update({name: getattr(torch._VF, name) for name in _CALLED})

clip_grad_norm_, get_total_norm = torch.nn.utils.clip_grad_norm_, torch.nn.utils.get_total_norm

__all__ = ["VF", "F", "clip_grad_norm_", "get_total_norm"]
