"""``python -m llmkern info``: what this installation is and what it can do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer


def info(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False) -> None:
    """Say what this installation can do: versions, CPU, backends, what was not built and how to get it."""
    facts = environment() | capabilities()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)


def environment() -> dict[str, Any]:
    """The versions and the machine that every report of this package names."""
    import torch

    from .. import __version__
    from .._openmp import load_native

    try:
        native = load_native()
        isa, compiler = native.isa(), native.build_info()["compiler"]
    except (ImportError, ValueError):  # not built, or LLMKERN_CPU_ISA names what is not there
        isa = compiler = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "llmkern": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "compiler": compiler,
        "gpu": gpu,
    }


def capabilities() -> dict[str, Any]:
    """What the backends can do here: ``backends`` maps a name to why it is unavailable, or to ``None``."""
    from .. import dispatch, native

    return {
        "backends": {name: _why_not(name) for name in dispatch.BACKENDS},
        "not_built": native.build_info().get("missing", {}),
        "ops": {op: _serves(op) for op in sorted(dispatch.TABLE)},
    }


def _why_not(backend: str) -> str | None:
    """Why a backend cannot run, be it that an environment variable means nothing."""
    from .. import dispatch

    try:
        return dispatch.unavailable(backend)
    except ValueError as error:
        return str(error)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _serves(op: str) -> dict[str, str]:
    """What each backend serves of an op: "no", "yes", or "yes" and after a comma the options it knows or lacks."""
    from .. import dispatch

    cells: dict[str, str] = {}
    for name in dispatch.BACKENDS:
        support = dispatch.TABLE[op].get(name)
        cells[name] = "no" if support is None else str(support)
    return cells


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    names = {"isa": "instruction set", "cpu": "CPU", "gpu": "GPU", "python": "Python"}
    for key in ("llmkern", "python", "torch", "triton", "system", "cpu", "isa", "compiler", "cores", "threads", "gpu"):
        value = facts[key] if facts[key] is not None else "none"
        console.print(f"{names.get(key, key):<16} {escape(str(value))}", highlight=False)

    backends = Table("backend", "here", title="Backends", title_justify="left")
    for name, reason in facts["backends"].items():
        backends.add_row(name, "available" if reason is None else escape(f"no: {reason}"))
    console.print("", backends)

    if facts["not_built"]:
        missing = Table("library", "why, and how to get it", title="Not built", title_justify="left")
        for name, reason in facts["not_built"].items():
            missing.add_row(name, escape(reason))
        console.print("", missing)

    ops = Table("op", *facts["backends"], title="Ops (--json names the options)", title_justify="left")
    for op, cells in facts["ops"].items():
        ops.add_row(op, *(cell.split(",")[0] for cell in cells.values()))
    console.print("", ops)
