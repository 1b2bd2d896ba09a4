"""Result files, and the tables made of them (terminal and Markdown)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .runner import OURS, Measurement, Row

FORMAT = 1


def save(path: Path, environment: dict[str, Any], limits: dict[str, float], rows: list[Row]) -> None:
    """Writes a result file whole or not at all."""
    content = {
        "format": FORMAT,
        "environment": environment,
        "limits": limits,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


class ResultFileError(ValueError):
    """Not a result file of this suite."""


def load(path: Path) -> tuple[dict[str, Any], dict[str, float], list[Row]]:
    """Reads a result file: environment, limits, rows.

    Raises:
        ResultFileError: if it cannot be read, or is not one.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ResultFileError(f"{path}: result format {content['format']}, expected {FORMAT}")
        rows = []
        for raw in content["rows"]:
            results = {name: Measurement(**m) for name, m in raw.pop("results").items()}
            rows.append(Row(**raw, results=results))
        return content["environment"], content["limits"], rows
    except OSError as error:
        raise ResultFileError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ResultFileError(f"{path} is not a result file of `llmkern bench --json`: {error!r}") from error


def time_text(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    return "–"


def bytes_text(n: int | None) -> str:
    if n is None:
        return "–"
    return f"{n / 2**20:,.0f} MiB" if n >= 2**20 else f"{n / 2**10:.0f} KiB"


def environment_line(environment: dict[str, Any], limits: dict[str, float]) -> str:
    """The header over every table."""
    e = environment
    parts = [
        e["gpu"] or e["cpu"],
        f"{e['threads']} threads",
        f"torch {e['torch']}",
        f"llmkern {e['llmkern']}" + (f" ({e['commit']})" if e.get("commit") else ""),
        e["date"][:16].replace("T", " ") + " UTC",
        f"load {e['load']:.1f}",
    ]
    measured = ", ".join(
        f"{k} {v:,.0f} {'GB/s' if k in ('read', 'copy', 'store') else 'GF/s'}" for k, v in limits.items()
    )
    return " · ".join(parts) + (f"\nmeasured limits: {measured}" if measured else "")


def peers_of(rows: list[Row]) -> list[str]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(name for name in row.results if name != OURS))
    return list(names)


def ratio_text(measurement: Measurement | None) -> str:
    """A peer's time over ours: above 1 we are faster. A peer that failed is marked, its reason stands below."""
    if measurement is None:
        return "–"
    if measurement.ratio is None:
        return "failed" if measurement.reason else "–"
    mark = "" if round(measurement.ratio, 2) >= 1 else " ▼"
    return f"{measurement.ratio:.2f}×{mark}"


def cells(row: Row, peers: list[str]) -> list[str]:
    """One row of the table, as text: case, time, a ratio per peer, share of the limit, memory, match."""
    ours = row.results.get(OURS, Measurement())
    share = f"{row.share:.0%} {row.bound}" if row.share is not None else "–"
    torch_peak = row.results["torch"].peak if "torch" in row.results else None
    memory = bytes_text(ours.peak) + (f" ({bytes_text(torch_peak)})" if torch_peak is not None else "")
    match = "–" if ours.match is None else f"{'✓' if ours.match else '✗'} {ours.error:.0e}"
    spread = ""
    if ours.median and ours.low is not None and ours.high is not None:
        spread = f" ±{(ours.high - ours.low) / 2 / ours.median:.0%}"
    timing = time_text(ours.median) + spread if ours.median else f"failed: {ours.reason}"
    return [row.id, timing, *(ratio_text(row.results.get(p)) for p in peers), share, memory, match]


def header(peers: list[str]) -> list[str]:
    return ["case", "llmkern", *(f"vs {p}" for p in peers), "of limit", "peak memory (torch)", "match"]


def reasons(rows: list[Row]) -> list[str]:
    """Why measurements are missing, each reason once."""
    seen: dict[str, str] = {}
    for row in rows:
        for name, measurement in row.results.items():
            if measurement.reason:
                seen.setdefault(f"{name}: {measurement.reason}", row.id)
    return [f"{reason} (first at {id})" for reason, id in seen.items()]


def print_table(console: Console, environment: dict[str, Any], limits: dict[str, float], rows: list[Row]) -> None:
    console.print(environment_line(environment, limits), style="dim", highlight=False)
    peers = peers_of(rows)
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(header(peers)):
        table.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        behind = row.best is not None and round(row.best[1], 2) < 1
        table.add_row(*cells(row, peers), style="yellow" if behind else None)
    console.print(table)
    console.print("Ratios are a peer's time over ours; ▼ and yellow: the peer is faster.", style="dim")
    for reason in reasons(rows):
        console.print(f"not measured: {reason}", style="dim", highlight=False)


def markdown(environment: dict[str, Any], limits: dict[str, float], rows: list[Row]) -> str:
    """The same table for README and docs."""
    peers = peers_of(rows)
    lines = [environment_line(environment, limits).replace("\n", "  \n"), ""]
    lines.append("| " + " | ".join(header(peers)) + " |")
    lines.append("|" + "---|" + "---:|" * (len(peers) + 4))
    lines += ["| " + " | ".join(cells(row, peers)) + " |" for row in rows]
    lines += ["", "Ratios are a peer's time over ours; ▼: the peer is faster."]
    return "\n".join(lines)
