"""Results as text: the table in the terminal, the same in Markdown, and README's section."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .result import Measurement, Result, Row, peer_of, peers_of

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
MARKS = {"hugepages": "ʰ", "thp": "ᵗ"}
LEGEND = (
    "Ratios are a peer's time over llmkern's in the same run; ▼: the peer is faster; ʰ ᵗ: it is best with glibc's or "
    "torch's huge pages; ≠: its numbers are not the reference's. Of limit: the least time that the measured limits "
    "allow, over llmkern's (over its cold time where caches, not memory, would be measured)."
)


def time_text(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "–"
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{seconds / scale:.3g} {unit}"


def bytes_text(n: int | None) -> str:
    if n is None:
        return "–"
    return f"{n / 2**20:,.0f} MiB" if n >= 2**20 else f"{n / 2**10:.0f} KiB"


def environment_text(result: Result) -> str:
    """The header over every table: the machine, what is installed, when, and the limits."""
    e = result.environment
    machine = [e["cpu"], f"{e['threads']} of {e['cores']} cores", str(e["isa"]), f"{e['memory'] / 2**30:.0f} GiB"]
    machine += [f"{e['cache'] / 2**20:.0f} MiB cache", f"huge pages {e['hugepages']}"]
    versions = [f"llmkern {e['llmkern']}" + (f" ({e['commit']})" if e["commit"] else ""), f"torch {e['torch']}"]
    versions += [f"{name} {version}" for name, version in e["peers"].items()] + [f"Python {e['python']}"]
    when = [e["date"][:16].replace("T", " ") + " UTC", f"load {e['load']:.1f}"]
    limits = ", ".join(
        f"{k} {v:,.0f} {'GB/s' if k in ('read', 'copy', 'store') else 'GF/s'}" for k, v in result.limits.items()
    )
    lines = [" · ".join(([e["gpu"]] if e["gpu"] else []) + machine), " · ".join(versions), " · ".join(when)]
    return "\n".join(lines) + " · " + (f"measured limits: {limits}" if limits else "no limits: not built natively")


def ratio_text(row: Row, peer: str | None) -> str:
    """The peer's best time over ours: above 1 we are faster. One that failed is marked; its reason stands below.
    None is the best of all peers, by name."""
    best = row.best(peer)
    if best is None:
        failed = any(m.reason and not m.absent for name, m in row.results.items() if peer_of(name) == peer)
        return "failed" if failed else "–"
    name, ratio = best
    mark = MARKS.get(name.partition("+")[2], "")
    wrong = " ≠" if row.results[name].match is False else ""
    return f"{ratio:.2f}×{mark}" + ("" if round(ratio, 2) >= 1 else " ▼") + wrong + (f" {name}" if peer is None else "")


def cells(row: Row, peers: Sequence[str | None]) -> list[str]:
    """A row as text, by the titles of :func:`header`."""
    ours, torch = row.ours, row.results.get("torch", Measurement())
    timing = f"failed: {ours.reason}"
    if ours.median:
        timing = time_text(ours.median)
        if ours.low is not None and ours.high is not None:
            timing += f" ±{(ours.high - ours.low) / 2 / ours.median:.0%}"
    cold = time_text(ours.cold)
    if best := row.best(cold=True):
        cold += f", {best[1]:.2f}×" + ("" if round(best[1], 2) >= 1 else " ▼")
    share = f"{row.share:.0%} {row.bound}" if row.share is not None else "–"
    memory = bytes_text(ours.peak) + (f" ({bytes_text(torch.peak)})" if torch.peak is not None else "")
    match = "–" if ours.match is None else f"{'✓' if ours.match else '✗'} {ours.error:.0e}"
    return [row.title, timing, *(ratio_text(row, peer) for peer in peers), cold, share, memory, match]


def header(peers: Sequence[str | None]) -> list[str]:
    titles = ["case", "llmkern", *(f"vs {peer or 'best peer'}" for peer in peers), "cold, vs best"]
    return [*titles, "of limit", "peak memory (torch)", "match"]


def reasons(rows: list[Row]) -> list[str]:
    """Why measurements are missing, each reason once."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for name, m in row.results.items():
            if m.reason:
                what = "not measured" if m.absent else "failed"
                seen.setdefault(f"{name} {what}: {m.reason}", []).append(row.id)
    return [f"{reason} ({ids[0]}" + (f" and {len(ids) - 1} more)" if ids[1:] else ")") for reason, ids in seen.items()]


def print_table(console: Console, result: Result) -> None:
    console.print(environment_text(result), style="dim", highlight=False, markup=False)
    peers: list[str | None] = [*peers_of(result.rows)]
    if len(peers) > 2 and console.width < 90 + 12 * len(peers):
        peers = ["torch", None]
    table = Table(box=None, pad_edge=False)
    # Names are to be read even where the rest has to fold.
    width = 25 if console.width < 120 else None
    for i, title in enumerate(header(peers)):
        table.add_column(title, justify="right" if i else "left", overflow="fold", width=None if i else width)
    for row in result.rows:
        table.add_row(*map(escape, cells(row, peers)), style="yellow" if row.behind else None)
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    for reason in reasons(result.rows):
        console.print(reason, style="dim", highlight=False, markup=False)


def markdown(result: Result) -> str:
    """The table in Markdown."""
    peers = peers_of(result.rows)
    return _table(header(peers), [cells(row, peers) for row in result.rows])


def _table(titles: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, rule, *lines))


def readme_section(result: Result, source: str) -> str:
    """What README says of a result file: the quick runs one by one, all runs op by op, and every run where we lose."""
    rows = [row for row in result.rows if row.scaling is None]
    quick = Result(result.environment, result.limits, [row for row in rows if row.quick])
    parts = [
        f"<!-- made by: python -m llmkern bench readme {source} -->",
        "```text\n" + environment_text(result) + "\n```",
        f"From [{source}]({source}). {LEGEND}",
        markdown(quick),
    ]
    if len(rows) > len(quick.rows):
        parts += [f"All {len(rows)} runs of that file, op by op:", _table(*_summary(rows))]
    behind = [row for row in rows if row.behind]
    lost = [f"- `{row.id}`: {row.best()[0]} takes {row.best()[1]:.2f}× llmkern's time" for row in behind]  # type: ignore[index]
    if lost:
        parts.append(
            f"<details><summary>Where a peer is faster: {len(lost)} of {len(rows)} runs</summary>\n\n"
            + "\n".join(lost)
            + "\n\n</details>"
        )
    return "\n\n".join(parts)


def _summary(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """By op: the geometric mean and the range of the ratios to torch, and how often the best peer is behind."""
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        members = [row for row in rows if row.op == op and row.best()]
        ratios = [best[1] for row in members if (best := row.best("torch"))]
        if not ratios:
            continue
        ahead = sum(not row.behind for row in members)
        spread = f"{min(ratios):.2f}× to {max(ratios):.2f}×"
        lines.append(
            [op, str(len(members)), f"{statistics.geometric_mean(ratios):.2f}×", spread, f"{ahead} of {len(members)}"]
        )
    return ["op", "runs", "vs torch, geometric mean", "range", "at least as fast as every peer"], lines


class DocumentError(ValueError):
    """A document without the markers that the section belongs between."""


def source_in(document: str) -> str | None:
    """The result file that a document's section says it was made from."""
    _, found, rest = document.partition("bench readme ")
    return rest.split(" -->")[0].strip() if found else None


def put_into(document: Path, result: Result, path: Path) -> None:
    """Replaces what stands between the markers of the document.

    Raises:
        DocumentError: if it cannot be read or has no markers.
    """
    try:
        text = document.read_text()
    except OSError as error:
        raise DocumentError(f"{document} cannot be read: {error.strerror}") from error
    if BEGIN not in text or END not in text:
        raise DocumentError(f"{document} has no section to write: expected the lines {BEGIN} and {END}")
    source = Path(os.path.relpath(path.resolve(), document.resolve().parent)).as_posix()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(f"{head}{BEGIN}\n{readme_section(result, source)}\n{END}{tail}")


def as_row_values(row: Row, peers: list[str]) -> list[Any]:
    """What each cell sorts by, by the titles of :func:`header`; None where there is nothing."""
    ratios = [best[1] if (best := row.best(peer)) else None for peer in peers]
    return [row.id, row.ours.median, *ratios, row.ours.cold, row.share, row.ours.peak, row.ours.error]
