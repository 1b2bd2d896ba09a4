"""What a benchmark case is.

A case names a problem, its FLOPs and the fewest bytes it must move, and sets the problem up for one *namespace*: a
set of torch-shaped modules (``nn``, ``functional``, ``optim``). torch and llmkern are two namespaces of the same
code, so that a comparison is fair by construction; peers with another interface (JAX, ...) live in ``peer_<name>``
and draw the same inputs with the case's own ``draw``.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# Those that have a file here.
OPS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
PHASES = ("forward", "forward+backward", "step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")


class UnknownNameError(ValueError):
    """A case, op, phase, dtype or peer that does not exist; the message lists those that do."""


@dataclass(frozen=True)
class Cost:
    """The least work of one call: arithmetic, and the bytes that any implementation must read and write."""

    flops: float = 0.0
    reads: float = 0.0
    writes: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where the tensors of a case live and of what they are; call it with a tensor or a module to move it there.

    Values are rounded to ``dtype`` and then widened to ``compute``: a reference in fp64 starts from the very numbers
    that the others start from.
    """

    device: str
    dtype: torch.dtype
    compute: torch.dtype
    seed: int

    def __call__(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor) and not thing.is_floating_point():
            return thing.to(self.device)
        return thing.to(self.device, self.dtype).to(self.compute)

    def generator(self) -> torch.Generator:
        """A generator for the inputs; it seeds torch's own as well, from which modules draw their parameters."""
        torch.manual_seed(self.seed)
        return torch.Generator().manual_seed(self.seed)


Call = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        op: the op stem it belongs to, or "scaling".
        name: unique, and fixed for ever: results compare over time by it.
        problem: the kind of problem, by which peers with an interface of their own find their version of it.
        phases: which of ``PHASES`` it is timed in.
        cost: ``cost(phase, itemsize)``: the least work.
        setup: ``setup(namespace, phase, place)`` builds the inputs and returns a function without arguments that
            runs the phase once and returns the named results to compare, as a dict of tensors.
        sizes: what determines the problem: sizes, and the options by name.
        quick: the phases that belong to the quick set.
        exact: whether an fp64 reference of it fits into memory and patience; else torch in fp32 stands in.
        scaling: ``(curve, axis, value)`` of a point on a scaling curve.
        threads: run with this many threads instead of all.
        devices: where it is of use: some sizes are for a GPU.
    """

    op: str
    name: str
    problem: str
    phases: tuple[str, ...]
    cost: Callable[[str, int], Cost]
    setup: Callable[[SimpleNamespace, str, Place], Call]
    sizes: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    quick: tuple[str, ...] = ()
    exact: bool = True
    scaling: tuple[str, str, float] | None = None
    threads: int | None = None
    devices: tuple[str, ...] = DEVICES

    def dtypes_on(self, device: str) -> tuple[str, ...]:
        return (*self.dtypes, "fp16") if device == "cuda" and "bf16" in self.dtypes else self.dtypes


@dataclass(frozen=True)
class Run:
    """A case in one phase and one dtype: a row of the report."""

    case: Case
    phase: str
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.case.name}/{self.dtype}/{self.phase}"

    @property
    def cost(self) -> Cost:
        return self.case.cost(self.phase, DTYPES[self.dtype].itemsize)

    def place(self, device: str = "cpu", compute: torch.dtype | None = None) -> Place:
        dtype = DTYPES[self.dtype]
        return Place(device, dtype, compute or dtype, zlib.crc32(self.case.name.encode()))


def load_cases() -> list[Case]:
    """All cases of all ``bench_<op>`` modules, in the order of ``OPS``."""
    cases: list[Case] = []
    for op in OPS:
        cases += importlib.import_module(f"{__package__}.bench_{op}").CASES
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), "two cases share a name"
    return cases


def _check(given: Iterable[str], known: Iterable[str], what: str) -> None:
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
    device: str = "cpu",
) -> list[Run]:
    """The runs to make, in the suite's order.

    Args:
        ops: op stems; default all.
        patterns: case names or shell patterns of them; each must match something. A named case runs even if it is
            not in the quick set.
        dtypes: default one in the quick set (fp32; on a GPU bf16), else all that a case has on the device.
        phases: default all that a case has.
        quick: the quick set only.
        device: "cpu" or "cuda".

    Raises:
        UnknownNameError: for a name or pattern that matches nothing.
    """
    _check(ops or (), OPS, "op")
    _check(dtypes or (), DTYPES, "dtype")
    _check(phases or (), PHASES, "phase")
    _check([device], DEVICES, "device")
    cases = [case for case in load_cases() if device in case.devices and (not ops or case.op in ops)]
    for pattern in patterns or ():
        if not any(fnmatch(case.name, pattern) for case in cases):
            raise UnknownNameError(f"no case matches {pattern!r}; known: {', '.join(case.name for case in cases)}")
    if patterns:
        cases = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in patterns)]
        quick = False
    preferred = "bf16" if device == "cuda" else "fp32"
    runs = []
    for case in cases:
        for dtype in case.dtypes_on("cuda" if dtypes else device):
            wanted = (
                dtype in dtypes if dtypes else not quick or dtype == (preferred if len(case.dtypes) > 1 else "fp32")
            )
            runs += [Run(case, phase, dtype) for phase in (case.quick if quick else case.phases) if wanted]
    return [run for run in runs if not phases or run.phase in phases]


def find(id: str) -> Run:
    """The run of this id."""
    name, dtype, phase = id.rsplit("/", 2)
    for case in load_cases():
        if case.name == name:
            return Run(case, phase, dtype)
    raise UnknownNameError(f"unknown case {name!r}")


def namespace(name: str) -> SimpleNamespace:
    """``torch`` or ``llmkern`` as ``nn``, ``functional`` and ``optim``."""
    return SimpleNamespace(
        name=name,
        nn=importlib.import_module(f"{name}.nn"),
        functional=importlib.import_module("torch.nn.functional" if name == "torch" else f"{name}.functional"),
        optim=importlib.import_module(f"{name}.optim"),
    )


def adam(ns: SimpleNamespace, parameters: Iterable[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
    """Adam in its fastest form: torch has a fused one to ask for, llmkern's needs no asking."""
    return ns.optim.Adam(parameters, lr=1e-3, **options, **({"fused": True} if ns.name == "torch" else {}))


def measure(benchmark: Any, run: Run, implementation: str) -> None:
    """The body of every test under pytest-benchmark. ``extra_info`` carries what the case must compute and move."""
    from . import peers

    peer = peers.load(implementation)
    call = peer.setup(run, "cpu")
    cost = run.cost
    benchmark.group = run.id
    benchmark.extra_info.update(flops=cost.flops, bytes=cost.reads + cost.writes, sizes=run.case.sizes)
    benchmark(lambda: peer.wait(call()))
