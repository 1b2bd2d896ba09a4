"""The one place that chooses a backend.

``TABLE`` says, for every op, which backend serves which devices, dtypes and options. :func:`pick` walks the backends
in order and takes the first that serves the call:

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

from . import _sizes
from ._graphs import asked_by_the_compiler, leaving
from ._plain import NESTED as NESTED
from ._plain import TRANSFORMS
from ._plain import autocasts as autocasts
from ._plain import mapped as mapped
from ._plain import strange as strange

BACKENDS = ("native", "triton", "torch", "reference")
_MODULES = {"native": "llmkern.native", "triton": "llmkern.kernels", "reference": "llmkern.reference"}

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class Support:
    """What one backend serves of one op. ``options`` are the non-default options it knows; an option is named by
    its keyword argument. ``unless(dtype, sizes)`` gives a reason why ``auto`` leaves a call to another backend, or
    ``None``."""

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype] = _FLOATS
    options: frozenset[str] = frozenset()
    unless: Callable[[torch.dtype, dict[str, int]], str | None] | None = None


def _cpu(*options: str, **kwargs: Any) -> Support:
    return Support(frozenset({"cpu"}), _FLOATS, frozenset(options), **kwargs)


def _gpu(*options: str, **kwargs: Any) -> Support:
    """Triton: on a GPU, and under its interpreter on the CPU, which `auto` never asks as native code comes first."""
    devices = {"cuda", "cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda"}
    return Support(frozenset(devices), _FLOATS, frozenset(options), **kwargs)


_LOSS_OPTIONS = (
    "weight",
    "label_smoothing",
    "probabilities",
    "z_loss",
    "softcap",
    "logit_scale",
    "token_weight",
    "outputs",
)

# What torch's recurrent layers have not.
_RNN_OPTIONS = (
    "num_heads",
    "state_dtype",
    "norms",
    "clip",
    "zoneout",
    "weight_dropout",
    "variational_dropout",
    "return_cell_states",
    "checkpoint_chunks",
)

# Of these, what the Triton kernels serve: no norms.
_TRITON_RNN_OPTIONS = ("batch_sizes", *(option for option in _RNN_OPTIONS if option != "norms"))

# What only torch's optimizers do. The last three with sparse gradients only.
_TORCHS_STEPS = (
    "complex tensors",
    "tensors that do not fit together",
    "capturable",
    "differentiable",
    "several sparse dimensions",
    "momentum",
    "weight_decay",
)

# An op's kernels by backend. `torch` and `reference` need no entry: they serve every option but those listed in
# TORCH_LACKS and REFERENCE_LACKS.
TABLE: dict[str, dict[str, Support]] = {
    "cross_entropy": {
        "native": _cpu(*_LOSS_OPTIONS, unless=_sizes.batched_by_torch),
        "triton": _gpu(*_LOSS_OPTIONS, unless=_sizes.batched_by_torch),
    },
    "nll_loss": {},
    "dropout": {"native": _cpu(), "triton": _gpu()},
    "embedding": {
        backend: on("padding_idx", "max_norm", "scale_grad_by_freq", "sparse", unless=_sizes.batched_by_torch)
        for backend, on in (("native", _cpu), ("triton", _gpu))
    },
    "embedding_bag": {
        backend: on(*("padding_idx", "max_norm", "scale_grad_by_freq", "sparse", "per_sample_weights", "weighted_mean"))
        for backend, on in (("native", _cpu), ("triton", _gpu))
    },
    "fused_embedding": {"native": _cpu(unless=_sizes.small_steps_are_quick), "triton": _gpu()},
    "linear": {
        "native": _cpu(unless=_sizes.linear_is_faster_in_torch),
        "triton": _gpu(unless=_sizes.the_product_is_torchs),
    },
    "linear_cross_entropy": {
        "native": _cpu(*_LOSS_OPTIONS, "options", "workspace", unless=_sizes.composition_is_better),
        "triton": _gpu(*_LOSS_OPTIONS, "options", "workspace", unless=_sizes.composition_is_better),
    },
    "mse_loss": {"native": _cpu(), "triton": _gpu()},
    "quantized_embedding": {"native": _cpu("bits"), "triton": _gpu("bits")},
    "lstm": {
        "native": _cpu(
            *("batch_sizes", "proj_size", "peepholes", "forget_bias", "zoneout_cell", *_RNN_OPTIONS),
            unless=_sizes.lstm_is_faster_in_torch,
        ),
        "triton": _gpu(
            *("peepholes", "forget_bias", "zoneout_cell", *_TRITON_RNN_OPTIONS),
            unless=_sizes.cudnn_was_not_compared_with,
        ),
    },
    **{
        mode: {
            "native": _cpu("batch_sizes", *_RNN_OPTIONS),
            "triton": _gpu(*_TRITON_RNN_OPTIONS, unless=_sizes.cudnn_was_not_compared_with),
        }
        for mode in ("gru", "rnn_tanh", "rnn_relu")
    },
    "slstm": {"native": _cpu("mode", "batch_sizes", *_RNN_OPTIONS), "triton": _gpu("mode", *_TRITON_RNN_OPTIONS)},
    "lstm_cell": {
        "native": _cpu(unless=_sizes.cell_is_faster_in_torch),
        "triton": _gpu(unless=_sizes.cudnn_was_not_compared_with),
    },
    **{
        f"{mode}_cell": {"native": _cpu(), "triton": _gpu(unless=_sizes.cudnn_was_not_compared_with)}
        for mode in ("gru", "rnn_tanh", "rnn_relu")
    },
    "grad_norm": {"native": _cpu(), "triton": _gpu()},
    "adam": {"native": _cpu("state_dtype"), "triton": _gpu("state_dtype")},
    "sgd": {"native": _cpu("state_dtype"), "triton": _gpu("state_dtype")},
    "adagrad": {"native": _cpu("state_dtype"), "triton": _gpu("state_dtype")},
    "row_optim": {"native": _cpu("row_grad"), "triton": _gpu("row_grad")},
    **{
        f"sparse_{name}": {"native": _cpu("state_dtype"), "triton": _gpu("state_dtype")}
        for name in ("sgd", "adagrad", "adam", "grad_norm")
    },
    "rowwise_adagrad": {"native": _cpu("rowwise"), "triton": _gpu("rowwise")},
}
TORCH_LACKS: dict[str, frozenset[str]] = {
    "quantized_embedding": frozenset({"bits"}),
    "cross_entropy": frozenset({"z_loss", "softcap", "logit_scale", "token_weight", "outputs"}),
    "embedding_bag": frozenset({"weighted_mean", *TRANSFORMS}),
    "lstm": frozenset({*_RNN_OPTIONS, *TRANSFORMS, "peepholes", "forget_bias", "zoneout_cell", "clipped_projection"}),
    **{mode: frozenset({*_RNN_OPTIONS, *TRANSFORMS}) for mode in ("gru", "rnn_tanh", "rnn_relu")},
    **{f"{mode}_cell": frozenset(TRANSFORMS) for mode in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "slstm": frozenset({"mode", *_RNN_OPTIONS}),
    "row_optim": frozenset({"row_grad"}),
    **{name: frozenset({"state_dtype"}) for name in ("adam", "sgd", "adagrad")},
    **{f"sparse_{name}": frozenset({"state_dtype"}) for name in ("sgd", "adagrad", "adam")},
    "rowwise_adagrad": frozenset({"rowwise"}),
}
REFERENCE_LACKS: dict[str, frozenset[str]] = {
    "embedding": frozenset({"sparse"}),
    "embedding_bag": frozenset({"sparse"}),
    "grad_norm": frozenset({"norm_type"}),
    "sparse_grad_norm": frozenset({"norm_type", "several sparse dimensions"}),
    **{name: frozenset(_TORCHS_STEPS) for name in ("adam", "sgd", "adagrad")},
    **{f"sparse_{name}": frozenset(_TORCHS_STEPS) for name in ("sgd", "adagrad", "adam")},
}


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


@asked_by_the_compiler
def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or ``None`` if it can."""
    if name not in _unavailable:
        try:
            _unavailable[name] = load(name).unavailable()
        except ImportError as error:
            _unavailable[name] = str(error)
    return _unavailable[name]


def _obstacle(
    name: str, op: str, tensors: tuple[torch.Tensor, ...], options: Iterable[str], sizes: dict[str, int]
) -> str | None:
    """Why backend `name` does not serve this call, or None if it does."""
    if name in ("torch", "reference"):
        known = TORCH_LACKS if name == "torch" else REFERENCE_LACKS
        lacks = [o for o in options if o in known.get(op, ())]
        return f"{name} has no option {', '.join(lacks)}" if lacks else None
    if name not in TABLE[op]:
        return "no kernel for this op yet"
    if _forced == "auto" and (maker := leaving()) is not None:
        return f"{maker} makes a graph to run elsewhere"
    if (reason := unavailable(name)) is not None:
        return reason
    support = TABLE[op][name]
    first = tensors[0]
    if first.device.type not in support.devices:
        return f"serves {', '.join(sorted(support.devices))}, not {first.device.type}"
    if first.dtype not in support.dtypes:
        return f"does not serve {first.dtype}"
    for other in tensors[1:]:
        if other.device != first.device or other.dtype != first.dtype:
            return f"mixed arguments: {first.dtype} on {first.device}, {other.dtype} on {other.device}"
    if any(t.layout != torch.strided for t in tensors):
        return "serves strided tensors only"
    unserved = [o for o in options if o not in support.options]
    if unserved:
        return f"does not serve {', '.join(unserved)}"
    return support.unless(first.dtype, sizes) if support.unless and _forced == "auto" else None


def pick(
    op: str, *tensors: torch.Tensor, options: Iterable[str] = (), torch_does: str | None = None, **sizes: int
) -> str:
    """The backend that serves a call of ``op``.

    Args:
        op: a key of ``TABLE``.
        tensors: the floating tensors of the call; they must share device and dtype for a kernel to serve them.
        options: names of the options that are in use with other than their neutral values, and what :func:`strange`
            says of all tensors of the call.
        torch_does: what the caller does on ``"torch"``, where that is not torch's own function; for explain.
        sizes: what a size rule of the table may want to see.

    Raises:
        BackendError: if a backend is forced and cannot serve, with the reason.
    """
    order = BACKENDS if _forced == "auto" else (_forced,)
    rejected: list[tuple[str, str]] = []
    for name in order:
        obstacle = _obstacle(name, op, tensors, options, sizes)
        if obstacle is None:
            if _trace is not None:
                reason = "forced" if _forced != "auto" else "first backend that serves this call"
                if name == "torch" and torch_does is not None:
                    reason += f": {torch_does}"
                _trace.append(Choice(op, name, reason, tuple(rejected)))
            return name
        rejected.append((name, obstacle))
    raise BackendError(
        f"{op}: backend {_forced!r} was forced, but {rejected[0][1]}; use backend('auto') to allow a fallback"
    )


def note(op: str, backend: str, reason: str) -> None:
    """Tells :func:`explain` of a choice that was made elsewhere."""
    if _trace is not None:
        _trace.append(Choice(op, backend, reason))


def leaves(op: str) -> bool:
    """Whether a graph of this call of ``op`` is being made to run elsewhere, which torch's own functions are left to,
    unless a backend is forced. For who can go torch's way as a whole, earlier than :func:`pick` is asked."""
    if _forced != "auto" or (maker := leaving()) is None:
        return False
    note(op, "torch", f"{maker} makes a graph to run elsewhere")
    return True


def shortcut(name: str) -> ModuleType | None:
    """The namespace of backend ``name``, if it may serve a call that does not ask :func:`pick`: it is here, nothing
    forbids it, nobody listens (to choices, or in a dispatch mode to ops). For calls that ``pick`` would give to it,
    where asking takes as long as answering."""
    if _trace is not None or _forced not in ("auto", name) or unavailable(name) is not None:
        return None
    if torch._C._len_torch_dispatch_stack() or leaving() is not None:
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
