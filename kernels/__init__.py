"""The Triton backend: the same function names, arguments and returns as ``llmkern.native``, on GPU tensors."""

from __future__ import annotations


def unavailable() -> str | None:
    """Why this backend cannot run here, or ``None`` if it can."""
    return "there is no Triton kernel yet"
