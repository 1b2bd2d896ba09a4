"""The pictures of a result file, as matplotlib figures: ratio bars, roofline, scaling curves.

Every figure is about as wide as a phone, so that a page can put one or several in a line and no label shrinks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .result import OURS, SHORT, Result, Row, peer_of, peers_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.6
OUR_COLOR, BEHIND = "#0b6e4f", "#c2571a"
PEER_COLORS = ("#4f4f4f", "#b08968", "#7b61c4", "#c9a227", "#3f7fc4", "#b5446e", "#5aa9a0", "#8a8f2b")
MARKERS = "osD^vPX*"


def figures(result: Result) -> dict[str, Figure]:
    """All figures that the rows have data for, by name, in the order to show them."""
    rows = [row for row in result.rows if row.scaling is None]
    peers = peers_of(result.rows)
    made: dict[str, Figure | None] = {"roofline": roofline(result.limits, rows)}
    for op, dtype in dict.fromkeys((row.op, row.dtype) for row in rows):
        members = [row for row in rows if (row.op, row.dtype) == (op, dtype)]
        made[f"ratios {op} {dtype}"] = ratio_bars(f"{op}, {dtype}", members, peers)
    curves: dict[str, list[Row]] = {}
    for row in result.rows:
        if row.scaling:
            curves.setdefault(row.scaling[0], []).append(row)
    for title, members in curves.items():
        made[f"scaling {title}"] = scaling_curve(title, members, peers)
    return {name: figure for name, figure in made.items() if figure is not None}


def _figure(height: float, **kwargs: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**kwargs)


def _style(peer: str, peers: list[str]) -> dict[str, Any]:
    """The same colour and marker for a peer in every figure of a file."""
    k = peers.index(peer)
    return {"color": PEER_COLORS[k % len(PEER_COLORS)], "marker": MARKERS[k % len(MARKERS)]}


def ratio_bars(title: str, rows: list[Row], peers: list[str]) -> Figure | None:
    """A bar a run, from 1 to the fastest peer's time over ours, on a log scale; markers for every peer."""
    rows = [row for row in rows if row.best()]
    if not rows:
        return None
    figure, axes = _figure(1.1 + 0.42 * len(rows))
    prefix = f"{rows[0].op}/" if all(row.case.startswith(f"{row.op}/") for row in rows) else ""
    for i, row in enumerate(rows):
        best = row.best()
        assert best is not None
        axes.barh(i, best[1] - 1, 0.36, left=1, color=BEHIND if row.behind else OUR_COLOR, alpha=0.85)
        label = f"{row.case.removeprefix(prefix)}  {SHORT[row.phase]}"
        # The label stands over its bar: beside it, it would leave the bars no room.
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.text(0.0, i - 0.3, label, fontsize=8, va="bottom", transform=axes.get_yaxis_transform(), bbox=paper)
    for peer in peers:
        points = [(best[1], i) for i, row in enumerate(rows) if (best := row.best(peer))]
        if points:
            axes.scatter(*zip(*points, strict=True), s=20, label=peer, zorder=3, linewidths=0, **_style(peer, peers))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.7), max(high, 1.5))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.5, -0.9)
    axes.set_title(f"{title}: a peer's time over llmkern's", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def roofline(limits: dict[str, float], rows: list[Row]) -> Figure | None:
    """GF/s over arithmetic intensity: what a case could reach, and what llmkern and torch reach."""
    rows = [row for row in rows if row.floor and row.flops and row.bytes and row.ours.median]
    if not rows or not limits.get("read"):
        return None
    figure, axes = _figure(4.6)
    low = min(row.flops / row.bytes for row in rows) / 2
    high = max(row.flops / row.bytes for row in rows) * 2
    intensity = [low * (high / low) ** (i / 200) for i in range(201)]
    for k, dtype in enumerate(dict.fromkeys(row.dtype for row in rows)):
        if peak := limits.get(dtype):
            roof = [min(peak, limits["read"] * x) for x in intensity]
            axes.plot(intensity, roof, "k" + ("-", "--", ":")[k % 3], linewidth=1, label=f"{dtype} limit")
    for name, color, marker in (("torch", PEER_COLORS[0], "x"), (OURS, OUR_COLOR, "o")):
        for k, dtype in enumerate(dict.fromkeys(row.dtype for row in rows)):
            timed = [(row, row.results[name].median) for row in rows if name in row.results and row.dtype == dtype]
            points = [(row.flops / row.bytes, row.flops / t / 1e9) for row, t in timed if t]
            if points:
                face = {"facecolors": "none", "edgecolors": color} if k and marker == "o" else {"color": color}
                size = 22 if k == 0 else 34
                axes.scatter(
                    *zip(*points, strict=True), marker=marker, s=size, linewidths=1, label=f"{name} {dtype}", **face
                )
    axes.set_xscale("log"), axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must be moved", fontsize=8), axes.set_ylabel("GF/s", fontsize=8)
    axes.set_title("Roofline: measured limits, and what is reached of them", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, which="major", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def scaling_curve(title: str, rows: list[Row], peers: list[str]) -> Figure | None:
    """Time and memory over one size: ours, and each peer's best time."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (time, memory) = _figure(5.0, nrows=2, sharex=True)
    axis = rows[0].scaling[1] if rows[0].scaling else ""
    drawn = False
    for peer in [OURS, *peers]:
        style = {"color": OUR_COLOR, "marker": "o"} if peer == OURS else _style(peer, peers)
        for panel, value in ((time, _seconds), (memory, _peak)):
            points = sorted((row.scaling[2], y) for row in rows if row.scaling and (y := value(row, peer)))
            if points:
                drawn = True
                label = peer if panel is time else None
                panel.plot(*zip(*points, strict=True), markersize=4, linewidth=1.4, label=label, **style)
    if not drawn:
        return None
    for panel, unit in ((time, "ms"), (memory, "MiB above the inputs")):
        panel.set_xscale("log", base=2), panel.set_yscale("log")
        panel.set_ylabel(unit, fontsize=8)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    values = sorted({row.scaling[2] for row in rows if row.scaling})
    memory.set_xticks(values, [f"{value:g}" for value in values])
    memory.xaxis.set_minor_locator(NullLocator())
    memory.set_xlabel(axis, fontsize=8)
    time.set_title(title, fontsize=9, loc="left")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _seconds(row: Row, peer: str) -> float | None:
    """Milliseconds of the peer's best variant."""
    times = [m.median for name, m in row.results.items() if peer_of(name) == peer and m.median]
    return min(times) * 1e3 if times else None


def _peak(row: Row, peer: str) -> float | None:
    """MiB. A call that needs less than can be seen shows as a page."""
    peak = row.results[peer].peak if peer in row.results else None
    return max(peak, 4096) / 2**20 if peak is not None else None


def write_plots(folder: Path, result: Result) -> list[Path]:
    """Writes every figure as a PNG into ``folder`` and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(result).items():
        paths.append(folder / f"{name.replace(' ', '-')}.png")
        figure.savefig(paths[-1], dpi=160)
    return paths
