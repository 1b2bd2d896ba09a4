"""The one place that chooses a backend.

``TABLE`` (``_support.py``) says, for every op, which backend serves which devices, dtypes and options. :func:`pick`
walks the backends in order and takes the first that serves the call:

``native``     C++ on the CPU (``csrc/``)
``triton``     Triton on a GPU, or under Triton's interpreter (``kernels/``)
``torch``      torch's own function, called exactly as the user called ours
``reference``  pure PyTorch (``llmkern/reference/``): complete, differentiable, and not in a hurry

A forced backend (``with backend(name)``, or ``LLMKERN_BACKEND``) that cannot serve raises; only ``auto`` falls back,
and :func:`explain` tells it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ._graphs import constant_while_compiling, exporter
from ._plain import NESTED as NESTED
from ._plain import autocasts as autocasts
from ._plain import not_plain as not_plain
from ._plain import onednn_takes as onednn_takes
from ._support import TABLE as TABLE
from ._support import Support as Support
from ._support import Work

BACKENDS = ("native", "triton", "torch", "reference")
_MODULES = {"native": "llmkern.native", "triton": "llmkern.kernels", "reference": "llmkern.reference"}


@dataclass(frozen=True)
class Choice:
    """One decision: ``rejected`` holds, in order, each backend passed over and why."""

    op: str
    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        return "\n".join(lines + [f"    not {name}: {why}" for name, why in self.rejected])


class BackendError(RuntimeError):
    """A forced backend cannot serve the call."""


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {', '.join(('auto', *BACKENDS))}")
    return name


# Process-wide, like torch.backends' flags. LLMKERN_BACKEND is read once.
_forced = _check_name(os.environ.get("LLMKERN_BACKEND", "auto"), "LLMKERN_BACKEND")
_trace: list[Choice] | None = None
_unavailable: dict[str, str | None] = {"torch": None, "reference": None}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every op inside the block onto one backend; ``"auto"`` lifts a force from outside.

    The choice is made when the forward runs; its backward follows it, also after the block has ended. Process-wide,
    not per thread.

    Raises:
        ValueError: if ``name`` is none of ``auto``, ``native``, ``triton``, ``torch``, ``reference``.
        BackendError: from an op inside the block that the backend cannot serve.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "llmkern.backend")
    try:
        yield
    finally:
        _forced = before


@cache
def load(name: str) -> ModuleType:
    """The namespace of a backend's functions."""
    return importlib.import_module(_MODULES[name])


@constant_while_compiling
def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or ``None`` if it can."""
    if name not in _unavailable:
        try:
            _unavailable[name] = load(name).unavailable()
        except ImportError as error:
            _unavailable[name] = str(error)
    return _unavailable[name]


def serves(name: str, op: str, options: Iterable[str]) -> bool:
    """Whether a backend has ``op`` and knows all of ``options``, wherever the tensors are."""
    return name in TABLE[op] and not TABLE[op][name].lacks(options)


def _obstacle(
    name: str, op: str, tensors: tuple[torch.Tensor, ...], options: Sequence[str], work: dict[str, Any]
) -> str | None:
    """Why backend `name` does not serve this call, or None if it does."""
    if (support := TABLE[op].get(name)) is None:
        return f"{name} has no such op" if name in ("torch", "reference") else "no kernel for this op yet"
    if name in ("torch", "reference"):
        lacks = support.lacks(options)
        return f"{name} has no option {', '.join(lacks)}" if lacks else None
    if _forced == "auto" and (maker := exporter()) is not None:
        return f"{maker} makes a graph to run elsewhere"
    if (reason := unavailable(name)) is not None:
        return reason
    first = tensors[0]
    if support.devices is not None and first.device.type not in support.devices:
        return f"serves {', '.join(sorted(support.devices))}, not {first.device.type}"
    if support.dtypes is not None and first.dtype not in support.dtypes:
        return f"does not serve {first.dtype}"
    for other in tensors[1:]:
        if other.device != first.device or other.dtype != first.dtype:
            return f"mixed arguments: {first.dtype} on {first.device}, {other.dtype} on {other.device}"
    if any([t.layout is not torch.strided for t in tensors]):  # noqa: C419
        return "serves strided tensors only"
    if lacks := support.lacks(options):
        return f"does not serve {', '.join(lacks)}"
    if _forced != "auto":
        return None
    if work.get("elements", support.least) < support.least:
        return "too small to gain"
    if support.unless is None:
        return None
    return support.unless(Work(op, first.dtype, options, **work))


def pick(
    op: str, *tensors: torch.Tensor, options: Sequence[str] = (), torch_does: str | None = None, **work: int
) -> str:
    """The backend that serves a call of ``op``.

    Args:
        op: a key of ``TABLE``.
        tensors: the floating tensors of the call; they must share device and dtype for a kernel to serve them.
        options: names of the options that are in use with other than their neutral values, and what :func:`not_plain`
            says of all tensors of the call.
        torch_does: what the caller does on ``"torch"``, where that is not torch's own function; for explain.
        work: what the op's rules of size look at: fields of :class:`Work`.

    Raises:
        BackendError: if a backend is forced and cannot serve, with the reason.
    """
    order = BACKENDS if _forced == "auto" else (_forced,)
    rejected: list[tuple[str, str]] = []
    for name in order:
        obstacle = _obstacle(name, op, tensors, options, work)
        if obstacle is None:
            if _trace is not None:
                reason = "forced" if _forced != "auto" else "first backend that serves this call"
                if name == "torch" and torch_does is not None:
                    reason += f": {torch_does}"
                _trace.append(Choice(op, name, reason, tuple(rejected)))
            return name
        rejected.append((name, obstacle))
    if _forced == "auto":
        why = "; ".join(f"{name}: {obstacle}" for name, obstacle in rejected)
        raise BackendError(f"{op}: no backend serves this call ({why})")
    raise BackendError(
        f"{op}: backend {_forced!r} was forced, but {rejected[0][1]}; use backend('auto') to allow a fallback"
    )


def note(op: str, backend: str, reason: str) -> None:
    """Tells :func:`explain` of a choice that was made elsewhere."""
    if _trace is not None:
        _trace.append(Choice(op, backend, reason))


def exported(op: str) -> bool:
    """Whether a graph of this call of ``op`` is being made to run elsewhere, which torch's own functions are left to,
    unless a backend is forced. For who can go torch's way as a whole, earlier than :func:`pick` is asked."""
    if _forced != "auto" or (maker := exporter()) is None:
        return False
    note(op, "torch", f"{maker} makes a graph to run elsewhere")
    return True


def small(op: str, tensor: object) -> bool:
    """Whether torch's own function gets a call in ``auto`` whatever else it is, because it is small, and would be over
    before :func:`pick` has said so. Not if somebody listens."""
    if _forced != "auto" or _trace is not None or type(tensor) is not torch.Tensor:
        return False
    return tensor.is_cpu and tensor.numel() < TABLE[op]["native"].least


def shortcut(name: str) -> ModuleType | None:
    """The namespace of backend ``name``, if it may serve a call that does not ask :func:`pick`: it is here, nothing
    forbids it, nobody listens (to choices, or in a dispatch mode to ops). For calls that ``pick`` would give to it,
    where asking takes as long as answering."""
    if _trace is not None or _forced not in ("auto", name) or unavailable(name) is not None:
        return None
    if torch._C._len_torch_dispatch_stack() or exporter() is not None:
        return None
    return load(name)


def synchronize(device: torch.device | int | None = None) -> None:
    """Waits until a GPU has done what it was given, and raises what its kernels have found.

    A kernel cannot raise: an index out of range is left out, noted, and raised by a later call of any op, or here.
    Without a GPU there is nothing to wait for.

    Args:
        device: a CUDA device. Default: the current one.

    Raises:
        IndexError: for an index or a target that was out of range.
    """
    if unavailable("triton") is None:
        load("triton").synchronize(device)
    elif torch.cuda.is_available():
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Explanation:
    """What ran and why: one :class:`Choice` per op call, in order. ``print`` it."""

    choices: tuple[Choice, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices)) or "no llmkern op was called"

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(choice.backend for choice in self.choices)


def explain(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs ``function(*inputs, **kwargs)`` (a module or a function) and says which backends served it and why.

    The call is real: a module in training mode draws its dropout, and errors come through.
    """
    global _trace
    before, _trace = _trace, []
    try:
        function(*inputs, **kwargs)
        return Explanation(tuple(_trace))
    finally:
        _trace = before
