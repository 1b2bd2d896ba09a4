"""Who is measured: llmkern, the reference, and every peer, under one small interface.

An implementation's name is ``base[+variant]``: ``torch``, ``torch.compile``, ``jax+hugepages``. Variants are
environments, read at process start, so that each implementation runs in a worker of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from .suite import Run, UnknownNameError, namespace, torch_dtype

VARIANTS: dict[str, dict[str, str]] = {
    "": {},
    # glibc asks for huge pages for every large allocation, whichever library makes it.
    "hugepages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    # torch's own switch for its CPU allocator.
    "thp": {"THP_MEM_ALLOC_ENABLE": "1"},
}


class Implementation:
    """Runs cases. ``setup`` returns a function that makes one call and returns its named results."""

    def setup(self, run: Run, device: str) -> Callable[[], dict[str, Any]]:
        raise NotImplementedError

    def wait(self, results: dict[str, Any]) -> None:
        """Returns once the results are computed (a GPU, or a library with a queue, is not done when a call is)."""


class TorchShaped(Implementation):
    """torch and llmkern: the case's own code over one namespace or the other."""

    def __init__(self, root: str) -> None:
        import torch

        self.ns = namespace(root)
        self.threads = torch.get_num_threads()

    def setup(self, run: Run, device: str) -> Callable[[], dict[str, Any]]:
        import torch

        torch.set_num_threads(run.case.threads or self.threads)
        return run.case.setup(self.ns, run.phase, device, torch_dtype(run.dtype))

    def wait(self, results: dict[str, Any]) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


class Compiled(TorchShaped):
    """torch.compile of the whole call, where it compiles."""

    def setup(self, run: Run, device: str) -> Callable[[], dict[str, Any]]:
        import torch

        return torch.compile(super().setup(run, device))


class Reference(TorchShaped):
    """The pure-PyTorch reference in fp64: what the numbers are compared with."""

    def __init__(self) -> None:
        super().__init__("llmkern")

    def setup(self, run: Run, device: str) -> Callable[[], dict[str, Any]]:
        import llmkern

        call = run.case.setup(self.ns, run.phase, device, torch_dtype("fp64"))

        def forced() -> dict[str, Any]:
            with llmkern.backend("reference"):
                return call()

        return forced


def _peer(module: str) -> Callable[[], Implementation]:
    return lambda: importlib.import_module(f"{__package__}.peer_{module}").Peer()


_BASES: dict[str, Callable[[], Implementation]] = {
    "llmkern": lambda: TorchShaped("llmkern"),
    "torch": lambda: TorchShaped("torch"),
    "torch.compile": lambda: Compiled("torch"),
    "reference": Reference,
}
# Optional: measured when installed, never required. The value is the module to look for.
OPTIONAL = {"jax": "jax"}
_BASES |= {name: _peer(name) for name in OPTIONAL}


def known() -> list[str]:
    """All implementation names."""
    return [base + (f"+{v}" if v else "") for base in _BASES if base != "reference" for v in VARIANTS]


def split(name: str) -> tuple[str, dict[str, str]]:
    """A name's base and the environment it needs.

    Raises:
        UnknownNameError: if there is no such implementation.
    """
    base, _, variant = name.partition("+")
    if base not in _BASES or variant not in VARIANTS:
        raise UnknownNameError(f"unknown peer {name!r}; known: {', '.join(known())}")
    return base, VARIANTS[variant]


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    base, _ = split(name)
    if base in OPTIONAL and importlib.util.find_spec(OPTIONAL[base]) is None:
        return f"{OPTIONAL[base]} is not installed; `make bench-peers` installs the peers"
    return None


def load(name: str) -> Implementation:
    """The implementation, in this process. Its variant's environment must have been set when the process began."""
    return _BASES[split(name)[0]]()
