"""What every Triton kernel needs on every GPU: registers, spills, shared memory, by compiling it without a GPU.

`python tests/kernel_gate.py` prints the table; `--write` makes what has changed the budget (`kernel_budgets.csv`). With
the Triton that the budget was made with, a spill is a failure, and so is a kernel that needs a tenth more than its
budget. With another, whose compiler decides otherwise, everything has to compile and to fit, and no spill may pass 32
bytes.

The same Triton compiles the same source to the same code, so a budget keeps the hash of the source that it was made
with, and tests and `--write` compile what has changed since (`changed`).
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from kernel_cases import Case, every_case
from llmkern.kernels import _launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have there.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
VERSION = "Triton " + ".".join(triton.__version__.split(".")[:2])
BUDGETS = Path(__file__).parent / "kernel_budgets.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

_POINTERS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Usage(NamedTuple):
    """Of one kernel on one target; ``spills`` in bytes of a thread's stack (NVIDIA) or in registers (AMD)."""

    registers: int
    spills: int
    shared: int


class Unit(NamedTuple):
    """A kernel with one configuration and the types of its arguments, as Triton specialises it."""

    name: str
    source: ASTSource
    options: dict[str, Any]

    def specialisation(self) -> str:
        """By what Triton tells compiled kernels apart."""
        return f"{self.name} {self.source.signature} {self.source.constants} {self.source.attrs} {self.options}"

    def digest(self) -> str:
        """By what is compiled: the kernel and the functions it calls, types, constants and options."""
        return hashlib.sha256(f"{self.source.hash()} {sorted(self.options.items())}".encode()).hexdigest()[:16]


def _type_of(value: Any, specialise: bool) -> tuple[str, bool]:
    """The type of an argument, and whether Triton may take it as divisible by 16."""
    if isinstance(value, torch.Tensor):
        return "*" + _POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, specialise and value % 16 == 0
    return "fp32", False


def unit(launch: _launch.Launch) -> Unit:
    """What would be compiled for this launch."""
    given = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.constexprs}
    constants, divisible, shown, dtypes = {}, {}, [], []

    def type_of(value: Any, name: str, path: tuple[int, ...], parameter: Any) -> Any:
        """The type of an argument, of a group its members' types. Triton specialises on every integer in a group."""
        grouped = len(path) > 1
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            members = [
                type_of(member, f"{name}.{field}", (*path, i), parameter)
                for i, (member, field) in enumerate(zip(value, fields, strict=True))
            ]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        assert not (grouped and isinstance(value, float)), f"{name}: a float in a group would be passed as fp32"
        specialise = grouped or not parameter.do_not_specialize
        constant = parameter.is_constexpr or isinstance(value, tl.constexpr)
        if constant or value is None or (specialise and type(value) is int and value == 1):
            constants[path] = getattr(value, "value", value)
            if constant:
                shown.append(f"{name.rpartition('.')[2]}={constants[path]}")
            elif value is None:
                shown.append(f"no {name.removesuffix('_ptr')}")
            return "constexpr"
        type_, by_16 = _type_of(value, specialise)
        if by_16 and (grouped or not parameter.do_not_specialize_on_alignment):
            divisible[path] = [["tt.divisibility", 16]]
        type_ = (not grouped and parameter.annotation_type) or type_
        if type_.startswith("*"):
            dtypes.append(type_[1:])
        return type_

    signature = {
        parameter.name: type_of(given.get(parameter.name, parameter.default), parameter.name, (position,), parameter)
        for position, parameter in enumerate(launch.kernel.params)
    }
    name = f"{launch.kernel.__name__}({', '.join(dict.fromkeys(dtypes))}) {' '.join(shown)}".strip()
    name += f" warps={launch.options['num_warps']}"
    return Unit(name, ASTSource(launch.kernel, signature, constants, divisible), launch.options)


def units_of(case: Case, **changes: Any) -> list[Unit]:
    """What a call of the case would compile, at its full size or another."""
    with _launch.recording() as launches:
        case.run(torch.device("meta"), **{**case.sizes, **changes})
    return list(map(unit, launches))


def every_unit() -> list[Unit]:
    """Every kernel and configuration that the cases launch, once."""
    units: dict[str, Unit] = {}
    for case in every_case().values():
        for made in units_of(case):
            units.setdefault(made.name, made)
    return sorted(units.values(), key=lambda u: u.name)


def measure(made: Unit, target: str) -> Usage:
    """Compiles and reads what the assembler says."""
    options = {k: v for k, v in made.options.items() if k != "launch_cooperative_grid" or target != "gfx942"}
    compiled = triton.compile(made.source, target=TARGETS[target], options=options)
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        numbers = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return Usage(numbers["vgpr_count"], numbers["vgpr_spill_count"], compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing.stdout)
    assert found, listing.stdout
    registers, stack, _, local = map(int, found.groups())
    return Usage(registers, stack + local, compiled.metadata.shared)


_units: list[Unit] = []


def _measure(job: tuple[int, str]) -> Usage | str:
    try:
        return measure(_units[job[0]], job[1])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def changed(units: list[Unit]) -> list[Unit]:
    """Those that are not as they were when their budget was made, or that another Triton would compile."""
    version, budgets = read_budgets()
    if version != VERSION:
        return units
    return [made for made in units if budgets.get(made.name, {}).get("source") != made.digest()]


def measure_all(units: list[Unit]) -> dict[str, dict[str, Usage | str]]:
    """Usage of every unit on every target, or what the compiler said; on all cores."""
    _units[:] = units
    jobs = [(i, target) for i in range(len(_units)) for target in TARGETS]
    # Workers see the units because they are forks: what Triton compiles does not pickle.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        results = pool.map(_measure, jobs, chunksize=4)
    table: dict[str, dict[str, Usage | str]] = {}
    for (i, target), result in zip(jobs, results, strict=True):
        table.setdefault(_units[i].name, {})[target] = result
    return table


def faults(table: dict[str, dict[str, Usage | str]]) -> list[str]:
    """What is wrong with each unit: it does not compile, spills, or needs more than it may."""
    version, budgets = read_budgets()
    budgeted = version == VERSION
    wrong = []
    for name, row in table.items():
        for target, usage in row.items():
            if isinstance(usage, str):
                wrong.append(f"{name} on {target}: {usage}")
                continue
            if usage.spills > (0 if budgeted else 32):
                wrong.append(f"{name} on {target}: spills {usage.spills}")
            if usage.shared > SHARED[target]:
                wrong.append(f"{name} on {target}: {usage.shared} bytes of shared memory, there are {SHARED[target]}")
            if not budgeted:
                continue
            if name not in budgets:
                wrong.append(f"{name}: has no budget; run python tests/kernel_gate.py --write")
                break
            registers, shared = map(int, budgets[name][target].split("/"))
            if usage.registers > max(registers * 1.1, registers + 8) or usage.shared > shared * 1.1:
                wrong.append(f"{name} on {target}: {usage}, budget {registers} registers and {shared} bytes")
    return wrong


def unused(units: list[Unit]) -> list[str]:
    """Budgets of what no case launches any more."""
    return sorted(read_budgets()[1].keys() - {made.name for made in units})


def read_budgets() -> tuple[str, dict[str, dict[str, str]]]:
    """The version of Triton that they were made with, and the budgets."""
    with BUDGETS.open(newline="") as file:
        version, *columns = next(reader := csv.reader(file))
        return version, {name: dict(zip(columns, cells, strict=True)) for name, *cells in reader}


def write_budgets(units: list[Unit], table: dict[str, dict[str, Usage | str]]) -> None:
    """``registers/shared bytes`` on each target, and the source that needs them; what is not in the table stays."""
    budgets = read_budgets()[1]
    with BUDGETS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([VERSION, *TARGETS, "source"])
        for made in units:
            kept, row = budgets.get(made.name), table.get(made.name)
            cells = [f"{usage.registers}/{usage.shared}" for usage in row.values()] if row else kept.values()  # type: ignore
            writer.writerow([made.name, *cells, *([made.digest()] if row else [])])


if __name__ == "__main__":
    every = every_unit()
    measured = measure_all(changed(every) if "--write" in sys.argv else every)
    for name, row in measured.items():
        print(name, *(f"\n    {target}: {usage}" for target, usage in row.items()), sep="")
    if "--write" in sys.argv:
        write_budgets(every, measured)
    print(*faults(measured), *unused(every), sep="\n")
