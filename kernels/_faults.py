"""Indices out of range, found by kernels and raised by the host, mostly as ``IndexError``, without waiting for kernels.

A kernel that finds a bad index leaves it out (it reads and writes nothing for it) and writes its value to a word of
pinned host memory, which a GPU reaches like its own. The host looks at these words when it launches the next kernel
and in :func:`llmkern.synchronize`: a read of memory, no call of the driver. So an error is raised by a later call, as
CUDA's own are, but it is an ordinary exception: the context lives, and no memory was touched outside the tensors.
Under the interpreter, where kernels are done when a launch returns, the call itself raises.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreting

# One word each. The texts are torch's; {} is the index.
MESSAGES = (
    "index out of range in self",
    "Target {} is out of bounds.",
    "embedding_bag: Expected idx >= 0 && idx < num_embeddings but found idx to be {}",
    "offsets[0] has to be 0, i.e., the first sequence in the mini-batch has to start from position 0. However, got {}",
    "offsets[-1] can not be greater than input's length but got offsets[-1] of {}",
    "embedding_bag: offsets must not decrease, but offsets[{}] does; each says where a bag begins",
    "positions: index out of range in self",
    "token_types: index out of range in self",
)
EMBEDDING, TARGET, BAG, FIRST_OFFSET, LAST_OFFSET, OFFSET_ORDER, POSITION, TOKEN_TYPE = range(len(MESSAGES))

# What is raised, if not an IndexError.
_ERRORS: dict[int, type[Exception]] = {
    FIRST_OFFSET: RuntimeError,
    LAST_OFFSET: RuntimeError,
    OFFSET_ORDER: ValueError,
}

# Not an index of anything: none was found.
_NONE = -(2**63)
_CLEAN = [_NONE] * len(MESSAGES)


@triton.jit
def report(bad, index, fault_ptr):
    """Notes one of the ``index`` where ``bad``."""
    tl.store(fault_ptr + tl.zeros_like(index).to(tl.int64), index.to(tl.int64), mask=bad)


@cache
def _words() -> Tensor:
    # Whatever mode or default device the first call finds.
    with torch.inference_mode(False):
        words = torch.full((len(MESSAGES),), _NONE, dtype=torch.int64, device="cpu")
        return words if interpreting() or not torch.cuda.is_available() else words.pin_memory()


@cache
def word(kind: int) -> Tensor:
    """The word (1) where a kernel reports faults of this kind: its ``fault_ptr``."""
    return _words()[kind : kind + 1]


def raise_any() -> None:
    """Raises the fault that a kernel has reported, if one has, and forgets it.

    Raises:
        IndexError: (or another, see above) with torch's own text; on a GPU it says too that an earlier call is meant.
    """
    if (values := _words().tolist()) == _CLEAN:
        return
    found = [(kind, value) for kind, value in enumerate(values) if value != _NONE]
    _words().fill_(_NONE)
    text = "; ".join(MESSAGES[kind].format(value) for kind, value in found)
    later = "" if interpreting() else f" (index {found[0][1]}, in an earlier call: kernels on a GPU run asynchronously)"
    raise _ERRORS.get(found[0][0], IndexError)(text + later)
