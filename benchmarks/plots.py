"""The pictures of a result file, as matplotlib figures: ratio bars, roofline, scaling curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import peers_of
from .runner import OURS, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUR_COLOR = "#0b6e4f"
PEER_COLORS = ("#6c757d", "#b08968", "#8e7dbe", "#c9a227", "#4f86c6", "#b56576")


def figures(limits: dict[str, float], rows: list[Row]) -> dict[str, Figure]:
    """All figures that the rows have data for, by name."""
    made = {"ratios": ratio_bars(rows), "roofline": roofline(limits, rows), "scaling": scaling_curves(rows)}
    return {name: figure for name, figure in made.items() if figure is not None}


def _figure(width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**kwargs)


def ratio_bars(rows: list[Row]) -> Figure | None:
    """A peer's time over ours, a bar per peer and run, on a log scale; left of 1 the peer is faster."""
    rows = [row for row in rows if row.scaling is None and row.best]
    if not rows:
        return None
    peers = peers_of(rows)
    figure, axes = _figure(9, 1.2 + 0.22 * len(rows) * max(1, len(peers)) ** 0.6)
    height = 0.8 / len(peers)
    for k, peer in enumerate(peers):
        bars = [(i, row.results[peer].ratio) for i, row in enumerate(rows) if peer in row.results]
        bars = [(i, ratio) for i, ratio in bars if ratio]
        color = PEER_COLORS[k % len(PEER_COLORS)]
        axes.barh(
            [i + k * height for i, _ in bars],
            [r - 1 for _, r in bars],
            height,
            left=1,
            color=color,
            label=peer,
        )
    axes.axvline(1, color=OUR_COLOR, linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row.id for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("peer's time over llmkern's (right of the line: llmkern is faster)")
    axes.legend(fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def roofline(limits: dict[str, float], rows: list[Row]) -> Figure | None:
    """GF/s over arithmetic intensity: what a case could reach, and what llmkern and torch reach."""
    rows = [row for row in rows if row.scaling is None and row.floor and row.flops and row.bytes]
    if not rows or not limits.get("read"):
        return None
    figure, axes = _figure(9, 5)
    low = min(row.flops / row.bytes for row in rows) / 2
    high = max(row.flops / row.bytes for row in rows) * 2
    intensity = [low * (high / low) ** (i / 200) for i in range(201)]
    for k, dtype in enumerate(sorted({row.dtype for row in rows}, reverse=True)):
        if peak := limits.get(dtype):
            roof = [min(peak, limits["read"] * x) for x in intensity]
            axes.plot(
                intensity,
                roof,
                color="black",
                linewidth=1,
                linestyle=("-", "--", ":")[k % 3],
                label=f"{dtype} limit",
            )
    for name, color, marker in ((OURS, OUR_COLOR, "o"), ("torch", PEER_COLORS[0], "x")):
        timed = [(row, row.results[name].median) for row in rows if name in row.results]
        points = [(row.flops / row.bytes, row.flops / t / 1e9) for row, t in timed if t]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=22, label=name, zorder=3)
    axes.set_xscale("log"), axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must be moved"), axes.set_ylabel("GF/s")
    axes.grid(alpha=0.25, which="both", linewidth=0.4)
    axes.legend(fontsize=8)
    return figure


def scaling_curves(rows: list[Row]) -> Figure | None:
    """Time over size, one panel a curve."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.scaling:
            curves.setdefault(row.scaling[0], []).append(row)
    if not curves:
        return None
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure, grid = _figure(3.4 * columns, 2.7 * lines, nrows=lines, ncols=columns, squeeze=False)
    panels = list(grid.flat)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel, (title, members) in zip(panels, curves.items(), strict=False):
        for k, name in enumerate([OURS, *peers_of(members)]):
            points = [
                (row.scaling[2], row.results[name].median) for row in members if row.scaling and name in row.results
            ]
            points = sorted((x, t * 1e3) for x, t in points if t)
            color = OUR_COLOR if name == OURS else PEER_COLORS[(k - 1) % len(PEER_COLORS)]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=name)
        panel.set_xscale("log"), panel.set_yscale("log")
        panel.set_title(title, fontsize=9), panel.set_ylabel("ms", fontsize=8)
        panel.set_xlabel(members[0].scaling[1] if members[0].scaling else "", fontsize=8)
        panel.grid(alpha=0.25, linewidth=0.4)
    panels[0].legend(fontsize=7)
    return figure


def write_plots(folder: Path, limits: dict[str, float], rows: list[Row]) -> list[Path]:
    """Writes every figure as a PNG into ``folder`` and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(limits, rows).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths
