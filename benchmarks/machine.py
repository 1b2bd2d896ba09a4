"""The machine: what it is, and what it can do at most, measured in the same run as the benchmarks."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from llmkern.cli.info import environment as installation

from . import peers
from .result import ENVIRONMENT, Result
from .suite import Cost


def environment() -> dict[str, Any]:
    """Everything a reader needs to judge or repeat the numbers."""
    facts = installation() | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "commit": _commit(),
        "cache": peers.cache_bytes(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "hugepages": _hugepages(),
        "peers": _peers(),
    }
    return {key: facts[key] for key in ENVIRONMENT}


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError):
        result = subprocess.run(git, capture_output=True, text=True)
        return result.stdout.strip() or None if result.returncode == 0 else None
    return None


def _hugepages() -> str | None:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text[text.index("[") + 1 : text.index("]")]


def _peers() -> dict[str, str]:
    """The version of every optional peer that is installed."""
    packages = importlib.metadata.packages_distributions()
    modules = {name: base.requires for name, base in peers.BASES.items() if base.requires}
    return {
        name: importlib.metadata.version(packages[module][0]) for name, module in modules.items() if module in packages
    }


def floor(cost: Cost, dtype: str, limits: dict[str, float]) -> tuple[float, str] | None:
    """The least seconds a call can take on this machine, and what bounds it: "flops" or "bytes".

    ``limits``: GF/s under ``fp32``, ``bf16``...; GB/s under ``read`` and ``store``. None if one is not known.
    """
    peak = limits.get(dtype) or limits.get("fp32")
    if not peak or not limits.get("read") or not limits.get("store"):
        return None
    compute = cost.flops / (peak * 1e9)
    traffic = cost.reads / (limits["read"] * 1e9) + cost.writes / (limits["store"] * 1e9)
    return (compute, "flops") if compute >= traffic else (traffic, "bytes")


def limits(device: str = "cpu") -> dict[str, float]:
    """The machine's ceilings, measured now: GF/s by dtype; GB/s of reading, copying and streaming stores."""
    return _gpu_limits() if device == "cuda" else _cpu_limits()


def raise_limits(result: Result, again: dict[str, float]) -> None:
    """Takes the larger of two measurements of the limits, say before and after a run: what was reached is possible."""
    result.limits = {name: max(value, again.get(name, value)) for name, value in result.limits.items()}
    for row in result.rows:
        if row.floor is not None and (found := floor(Cost(row.flops, row.reads, row.writes), row.dtype, result.limits)):
            row.floor, row.bound = found


def _cpu_limits() -> dict[str, float]:
    from llmkern._openmp import load_native

    try:
        native = load_native()
    except ImportError:
        return {}
    found = {"fp32": native.peak_flops("float32")}
    # Without a unit for it, bf16 runs at the fp32 rate at best.
    with contextlib.suppress(ValueError):
        found["bf16"] = native.peak_flops("bfloat16")
    for name, traffic in (("read", "read"), ("copy", "copy"), ("store", "stream")):
        found[name] = native.peak_bandwidth(traffic)
    return found


def _gpu_limits() -> dict[str, float]:
    def seconds(call: Any, repeat: int = 20) -> float:
        call()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        best = float("inf")
        for _ in range(5):
            begin.record()
            for _ in range(repeat):
                call()
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3 / repeat)
        return best

    found = {}
    for name, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        found[name] = 2 * 8192**3 / seconds(lambda a=a: a @ a, 5) / 1e9
    source, target = (torch.empty(1 << 30, device="cuda", dtype=torch.uint8) for _ in range(2))
    found["copy"] = found["read"] = found["store"] = 2 * (1 << 30) / seconds(lambda: target.copy_(source)) / 1e9
    return found
