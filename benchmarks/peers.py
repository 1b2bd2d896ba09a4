"""Who is measured: llmkern, the reference, and every peer, under one small interface.

An implementation's name is ``base[+variant]``: ``torch``, ``torch.compile``, ``jax+hugepages``. Variants are
environments, read at process start, so that each implementation runs in a worker of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .suite import Call, Run, UnknownNameError, namespace

VARIANTS: dict[str, dict[str, str]] = {
    "": {},
    # glibc asks for huge pages for every large allocation, whichever library makes it.
    "hugepages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    # torch's own switch for its CPU allocator.
    "thp": {"THP_MEM_ALLOC_ENABLE": "1"},
    # By default torch's cuDNN uses TF32 for fp32 and its matmul does not: both, and neither.
    "tf32": {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    "ieee": {"NVIDIA_TF32_OVERRIDE": "0"},
    # llmkern's own Triton kernels where `auto` would leave a call to torch.
    "triton": {"LLMKERN_BACKEND": "triton"},
}
# Variants that change no number: a report shows the best of them as one peer.
PAGES = ("hugepages", "thp")


class AbsentError(Exception):
    """There is nothing to measure: a peer has no version of a case."""


class Implementation:
    """Runs cases. ``setup`` returns a function that makes one call and returns its named results."""

    # Whether the first call compiles, so that memory is measured at the second.
    compiles = False
    _flood: Any = None

    def setup(self, run: Run, device: str) -> Call:
        raise NotImplementedError

    def wait(self, results: dict[str, Any]) -> None:
        """Returns once the results are computed (a GPU, or a library with a queue, is not done when a call is)."""

    def flush(self) -> None:
        """Empties the caches of every core: reads, which leaves nothing to write back, twice their size."""
        if self._flood is None:
            self._flood = np.zeros(2 * cache_bytes() // 8)
            self._pool = ThreadPoolExecutor(os.cpu_count())
        list(self._pool.map(np.sum, np.array_split(self._flood, os.cpu_count() or 1)))


def cache_bytes() -> int:
    """The size of the last-level cache that one core sees."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return min(max(sizes), 512 << 20)


class TorchShaped(Implementation):
    """torch, llmkern and whatever mirrors their names: the case's own code over a namespace."""

    def __init__(self, root: str, **functions: Callable[..., Any]) -> None:
        self.ns = namespace(root)
        if functions:
            self.ns.functional = _Overlay(self.ns.functional, functions)
        self.threads = torch.get_num_threads()

    def setup(self, run: Run, device: str) -> Call:
        torch.set_num_threads(run.case.threads or self.threads)
        return run.case.setup(self.ns, run.phase, run.place(device))

    def wait(self, results: dict[str, Any]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def flush(self) -> None:
        # On the pool that the call runs on: its threads are awake, as they would be between two ops of a model.
        if self._flood is None:
            gpu = torch.cuda.is_available()
            size = torch.cuda.get_device_properties(0).L2_cache_size if gpu else cache_bytes()
            self._flood = torch.zeros(2 * size // 4, device="cuda" if gpu else "cpu")
        self._flood.sum()


class _Overlay:
    """A module with some functions replaced."""

    def __init__(self, module: Any, functions: dict[str, Callable[..., Any]]) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Compiled(TorchShaped):
    """torch.compile of the whole call, where it compiles."""

    compiles = True

    def setup(self, run: Run, device: str) -> Call:
        return torch.compile(super().setup(run, device))


class Reference(TorchShaped):
    """What the numbers are compared with: llmkern's reference in fp64, or where that is too large torch in fp32."""

    def setup(self, run: Run, device: str) -> Call:
        if not run.case.exact:
            return run.case.setup(namespace("torch"), run.phase, run.place(device, torch.float32))
        import llmkern

        call = run.case.setup(self.ns, run.phase, run.place(device, torch.float64))

        def forced() -> dict[str, Any]:
            with llmkern.backend("reference"):
                return call()

        return forced


class Rewritten(Implementation):
    """A library with an interface of its own: ``_<problem>(run, place)`` writes the case in it."""

    library: str

    def setup(self, run: Run, device: str) -> Call:
        build = getattr(self, f"_{run.case.problem}", None)
        if build is None or run.case.threads:
            raise AbsentError(
                f"no {self.library} version of {run.case.problem}" + (" on fewer threads" if build else "")
            )
        return build(run, run.place(device))


@dataclass(frozen=True)
class Base:
    """A peer: ``load`` it in a process of its own; it needs the Python module ``requires``, runs on ``devices``, and
    has a version of ``problems`` (any if empty)."""

    load: Callable[[], Implementation]
    requires: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    problems: tuple[str, ...] = ()


def _module(file: str, *arguments: str) -> Callable[[], Implementation]:
    return lambda: importlib.import_module(f"{__package__}.{file}").Peer(*arguments)


_BOTH = ("cpu", "cuda")
_RNN = ("rnn", "rnn_steps")
_LCE = ("linear_cross_entropy",)
BASES: dict[str, Base] = {
    "llmkern": Base(lambda: TorchShaped("llmkern"), devices=_BOTH),
    "torch": Base(lambda: TorchShaped("torch"), devices=_BOTH),
    "torch.compile": Base(lambda: Compiled("torch"), devices=_BOTH),
    "torch.chunked": Base(_module("peer_torch_chunked"), devices=_BOTH, problems=_LCE),
    "reference": Base(lambda: Reference("llmkern"), devices=_BOTH),
    # Optional: measured when installed, never required.
    "jax": Base(_module("peer_jax"), "jax"),
    "tensorflow": Base(_module("peer_tensorflow"), "tensorflow"),
    "onnxruntime": Base(_module("peer_onnx", "onnxruntime"), "onnxruntime", problems=(*_RNN, "embedding")),
    "openvino": Base(_module("peer_onnx", "openvino"), "openvino", problems=(*_RNN, "embedding")),
    "fbgemm": Base(_module("peer_fbgemm"), "fbgemm_gpu", problems=("embedding", "embedding_bag")),
    "liger-kernel": Base(
        _module("peer_gpu", "liger-kernel"), "liger_kernel", ("cuda",), ("cross_entropy", "embedding", *_LCE)
    ),
    "cut-cross-entropy": Base(_module("peer_gpu", "cut-cross-entropy"), "cut_cross_entropy", ("cuda",), _LCE),
    "quack": Base(_module("peer_gpu", "quack"), "quack", ("cuda",), ("cross_entropy", *_LCE)),
    "flashrnn": Base(_module("peer_gpu", "flashrnn"), "flashrnn", ("cuda",), ("rnn",)),
}


def known() -> list[str]:
    """All implementation names that can be asked for."""
    bases = [base for base in BASES if base != "reference"]
    return [base + (f"+{v}" if v else "") for base in bases for v in VARIANTS if v != "triton" or base == "llmkern"]


def split(name: str) -> tuple[str, dict[str, str]]:
    """A name's base and the environment it needs.

    Raises:
        UnknownNameError: if there is no such implementation.
    """
    base, _, variant = name.partition("+")
    if base not in BASES or variant not in VARIANTS:
        bases = ", ".join(b for b in BASES if b != "reference")
        raise UnknownNameError(
            f"unknown peer {name!r}; known: {bases}; each also with {', '.join('+' + v for v in VARIANTS if v)}"
        )
    return base, VARIANTS[variant]


def expand(names: list[str]) -> list[str]:
    """The names, with shell patterns such as ``torch*`` replaced by what they match.

    Raises:
        UnknownNameError: for a name that is not known or a pattern that matches nothing.
    """
    found: dict[str, None] = {}
    for name in names:
        matches = [k for k in known() if fnmatch(k, name)] if any(c in name for c in "*?[") else [name]
        for match in matches or [name]:
            split(match)
            found[match] = None
    return list(found)


def defaults(quick: bool, device: str) -> list[str]:
    """Whom to measure against unless told: torch as it comes and with huge pages; beyond the quick set also whatever
    else torch has and every optional peer that is installed."""
    gpu = device == "cuda"
    names = ["torch", "torch+tf32", "torch+ieee"] if gpu else ["torch", "torch+hugepages", "torch+thp"]
    if quick:
        return names
    for base, peer in BASES.items():
        if base in ("llmkern", "torch", "reference") or device not in peer.devices or not_here(base, device):
            continue
        names += [base] if gpu else [base, f"{base}+hugepages"]
    return names


def not_here(name: str, device: str) -> str | None:
    """Why a peer cannot be measured on this machine, or None."""
    base, _ = split(name)
    peer = BASES[base]
    if device not in peer.devices:
        return f"{base} does not run on {device}"
    if peer.requires and importlib.util.find_spec(peer.requires) is None:
        return f"{peer.requires} is not installed; `make bench-peers` installs what PyPI has"
    return None


def has_no(name: str, run: Run) -> str | None:
    """Why a peer has no version of a run, as far as its name tells, or None."""
    base, _ = split(name)
    problems = BASES[base].problems
    return f"no version of {run.case.problem}" if problems and run.case.problem not in problems else None


def load(name: str) -> Implementation:
    """The implementation, in this process. Its variant's environment must have been set when the process began."""
    return BASES[split(name)[0]].load()
