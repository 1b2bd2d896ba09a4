"""What a benchmark case is.

A case names a problem, its FLOPs and the fewest bytes it must move, and sets the problem up for one *namespace*: a
set of torch-shaped modules (``nn``, ``functional``, ``optim``). torch and llmkern are two namespaces of the same
code, so that a comparison is fair by construction; peers with another interface (JAX, ...) live in ``peers``.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import ModuleType, SimpleNamespace
from typing import Any

OPS = ("cross_entropy", "linear_cross_entropy", "rnn", "embedding", "mse_loss", "optim", "model", "scaling")
PHASES = ("forward", "forward+backward", "step")
DTYPES = ("fp32", "bf16", "fp16")
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


class UnknownNameError(ValueError):
    """A case, op, phase, dtype or peer that does not exist; the message lists those that do."""


@dataclass(frozen=True)
class Cost:
    """The least work of one call: arithmetic, and the bytes that any implementation must read and write."""

    flops: float = 0.0
    reads: float = 0.0
    writes: float = 0.0


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        op: the op stem it belongs to.
        name: unique, and fixed for ever: results compare over time by it.
        phases: which of ``PHASES`` it is timed in.
        cost: ``cost(phase, itemsize)``: the least work.
        setup: ``setup(ns, phase, device, dtype)`` builds inputs from :func:`seed` and returns a function without
            arguments that runs the phase once and returns the named results to compare, as a dict of tensors.
        quick: whether it belongs to the quick set.
        exact: whether an fp64 reference of it fits into memory and patience; else torch in fp32 stands in.
        scaling: ``(curve, axis, value)`` of a point on a scaling curve.
        threads: run with this many threads instead of all.
    """

    op: str
    name: str
    phases: tuple[str, ...]
    cost: Callable[[str, int], Cost]
    setup: Callable[[SimpleNamespace, str, Any, Any], Callable[[], dict[str, Any]]]
    sizes: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    quick: bool = False
    exact: bool = True
    scaling: tuple[str, str, float] | None = None
    threads: int | None = None

    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Run:
    """A case in one phase and one dtype: a row of the report."""

    case: Case
    phase: str
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.case.name}/{self.dtype}/{self.phase}"


def load_cases() -> list[Case]:
    """All cases of all ``bench_<op>`` modules, in the order of ``OPS``."""
    cases: list[Case] = []
    for op in OPS:
        cases += importlib.import_module(f"{__package__}.bench_{op}").CASES
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), "two cases share a name"
    return cases


def _known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise UnknownNameError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def select(
    ops: list[str] | None = None,
    patterns: list[str] | None = None,
    dtypes: list[str] | None = None,
    phases: list[str] | None = None,
    quick: bool = False,
) -> list[Run]:
    """The runs to make, in the suite's order.

    Args:
        ops: op stems; default all.
        patterns: case names or shell patterns of them; each must match something. A named case runs even if it is
            not in the quick set.
        dtypes: default fp32 in the quick set, else all that a case has.
        phases: default all that a case has.

    Raises:
        UnknownNameError: for a name or pattern that matches nothing.
    """
    _known(ops or (), OPS, "op")
    _known(dtypes or (), DTYPES, "dtype")
    _known(phases or (), PHASES, "phase")
    cases = [case for case in load_cases() if not ops or case.op in ops]
    for pattern in patterns or ():
        if not any(fnmatch(case.name, pattern) for case in cases):
            raise UnknownNameError(f"no case matches {pattern!r}; known: {', '.join(case.name for case in cases)}")
    if patterns:
        cases = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in patterns)]
    elif quick:
        cases = [case for case in cases if case.quick]
    wanted = dtypes or (["fp32"] if quick else None)
    return [
        Run(case, phase, dtype)
        for case in cases
        for dtype in case.dtypes
        if wanted is None or dtype in wanted
        for phase in case.phases
        if not phases or phase in phases
    ]


def find(id: str) -> Run:
    """The run of this id."""
    name, dtype, phase = id.rsplit("/", 2)
    for case in load_cases():
        if case.name == name:
            return Run(case, phase, dtype)
    raise UnknownNameError(f"unknown case {name!r}")


def torch_dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[name]


def namespace(name: str) -> SimpleNamespace:
    """``torch`` or ``llmkern`` as ``nn``, ``functional`` and ``optim``."""
    root: ModuleType = importlib.import_module(name)
    return SimpleNamespace(
        name=name,
        nn=importlib.import_module(f"{name}.nn"),
        functional=importlib.import_module("torch.nn.functional" if name == "torch" else f"{name}.functional"),
        optim=importlib.import_module(f"{name}.optim"),
        root=root,
    )


def measure(benchmark: Any, run: Run, implementation: str) -> None:
    """The body of every test under pytest-benchmark. ``extra_info`` carries what the case must compute and move."""
    from . import peers

    call = peers.load(implementation).setup(run, "cpu")
    cost = run.case.cost(run.phase, ITEMSIZE[run.dtype])
    benchmark.group = run.id
    benchmark.extra_info.update(flops=cost.flops, bytes=cost.reads + cost.writes, sizes=run.case.sizes)
    benchmark(call)
