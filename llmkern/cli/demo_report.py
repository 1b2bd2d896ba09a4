"""What the demo found: one dictionary, and three ways to look at it.

:func:`summary` gathers every number once; the terminal, the picture and the JSON file show the same ones. Files are
written beside their place and then moved there, so that a reader never finds half of one.
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .demo_data import BATCH, VOCABULARY, WINDOW, Corpus, DemoError
from .demo_train import LEARNING_RATE, SEGMENT, Runner, agreement, differences, ratios
from .info import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

TABLE_ROWS = 12

# Okabe and Ito's orange and blue differ for every kind of colour vision, and in lightness. The curves coincide: a broad
# pale line under a narrow dark one shows both.
STYLES: dict[str, dict[str, Any]] = {
    "torch": {"color": "#E69F00", "linewidth": 5, "solid_capstyle": "round"},
    "llmkern": {"color": "#0B4F8A", "linewidth": 1.6},
}


def summary(
    both: list[Runner],
    corpus: Corpus,
    perplexity: list[float],
    peaks: list[int | None],
    paragraph: str,
    complete: bool,
) -> dict[str, Any]:
    """Every number of the report, ready for JSON; ``perplexity`` and ``peaks`` are in the order of ``both``."""
    found = agreement(both)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": complete,
        "environment": environment(),
        "settings": {
            **asdict(both[0].settings),
            "batch": BATCH,
            "window": WINDOW,
            "vocabulary": VOCABULARY,
            "learning_rate": LEARNING_RATE,
            "segment": SEGMENT,
        },
        "corpus": {
            "name": corpus.name,
            "train_words": len(corpus.train),
            "held_out_words": len(corpus.held_out),
            "different_words": len(corpus.words),
        },
        "steps": min(len(runner.losses) for runner in both),
        "implementations": {
            runner.name: {
                "optim": runner.optim_name,
                "tokens_per_second": runner.tokens_per_second,
                "perplexity": perplexity[i],
                "peak_bytes": peaks[i],
                "seconds_per_step": runner.seconds,
                "losses": runner.losses,
            }
            for i, runner in enumerate(both)
        },
        "ratio": _ratio(both),
        "agreement": {**asdict(found), "holds": found.holds},
        "paragraph": paragraph,
    }


def show(console: Console, both: list[Runner], facts: dict[str, Any]) -> None:
    """Prints the loss curves, how far they are apart, speed, memory, perplexity, and the paragraph."""
    console.print(f"\n{_machine(facts)}\n", highlight=False)
    if not facts["complete"]:
        console.print(f"Interrupted: the report covers {facts['steps']} steps.\n", style="yellow", highlight=False)
    console.print(_loss_table(both), _verdict(facts), "", _result_table(facts), _spread(facts["ratio"]), "", sep="\n")
    title = f"What llmkern.nn's model writes after {facts['steps']} steps"
    console.print(Panel(Text(facts["paragraph"]), title=title, title_align="left"))


def write_json(facts: dict[str, Any], path: Path) -> Path:
    """Writes ``facts``; NaN and infinity, which JSON lacks, become null.

    Raises:
        DemoError: if the file cannot be written.
    """
    try:
        _write(path, json.dumps(_plain(facts), indent=2, allow_nan=False).encode())
    except OSError as error:
        raise DemoError(f"--out: {path} cannot be written: {error.strerror}") from error
    return path


def plot(both: list[Runner], facts: dict[str, Any], path: Path) -> str | None:
    """Draws losses and speed into a PNG. Returns why there is none, or ``None`` if there is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed; `pip install matplotlib` and run the demo again"
    # A Figure of its own draws with Agg: no display, no pyplot, no global state.
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(2, 1))
    _draw_losses(panels[0, 0], both)
    _draw_differences(panels[1, 0], both, facts)
    _draw_speed(panels[0, 1], both)
    _draw_ratios(panels[1, 1], both, facts)
    for panel in panels.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("training step")
    ratio = facts["ratio"]
    title = f"llmkern.nn trains at {ratio['median']:.2f}× the speed of torch.nn"
    # The empty lines make room for the subtitle.
    figure.suptitle(title + " (busy machine)" * _busy(ratio) + "\n\n", fontsize=15, weight="bold")
    subtitle = f"{_quartiles(ratio)}\n{_machine(facts)}"
    figure.text(0.5, 0.945, subtitle, ha="center", va="top", fontsize=9, color="#555555")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    try:
        _write(path, picture.getvalue())
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return None


def _ratio(both: list[Runner]) -> dict[str, float]:
    """llmkern's speed over torch's: quartiles of the pairs, and the fastest segment of each.

    Other work on the machine only ever adds time, and not to both alike: the fastest segments have the least of it.
    """
    pairs = ratios(both)
    low, middle, high = statistics.quantiles(pairs, method="inclusive") if len(pairs) > 1 else pairs * 3
    theirs, ours = (min(runner.seconds) for runner in both)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "fastest": theirs / ours}


def _machine(facts: dict[str, Any]) -> str:
    where, settings = facts["environment"], facts["settings"]
    names = [where["cpu"], where["isa"] and f"({where['isa']})", f"· {where['threads']} threads"]
    device = where["gpu"] if settings["device"] == "cuda" else " ".join(filter(None, names))
    precision = "bfloat16 autocast" if settings["bf16"] else "float32"
    return f"llmkern {where['llmkern']} · torch {where['torch']} · {device} · {precision}"


def _loss_table(both: list[Runner]) -> Table:
    """Evenly spaced steps, first and last among them."""
    apart = differences(both)
    count = min(TABLE_ROWS, len(apart))
    table = Table("step", "torch.nn", "llmkern.nn", "apart", title="Loss", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for row in range(count):
        i = round(row * (len(apart) - 1) / max(1, count - 1))
        table.add_row(str(i + 1), *(f"{runner.losses[i]:.6f}" for runner in both), _small(apart[i]))
    return table


def _verdict(facts: dict[str, Any]) -> Text:
    found = facts["agreement"]
    rounding = "bfloat16" if facts["settings"]["bf16"] else "fp32"
    said = (
        f"The curves agree to {rounding} rounding."
        if found["holds"]
        else f"The curves DIFFER beyond {rounding} rounding."
    )
    return Text(
        f"{said} Largest difference, relative to the loss:\n"
        f"{_small(found['first'])} in the first {SEGMENT} steps (bound {_small(found['first_bound'])}),"
        f" {_small(found['largest'])} in all (bound {_small(found['largest_bound'])}).\n"
        "Each step magnifies the rounding before it, and would between two runs of torch.",
        style="green" if found["holds"] else "bold red",
    )


def _result_table(facts: dict[str, Any]) -> Table:
    theirs, ours = facts["implementations"].values()
    ratio = facts["ratio"]
    table = Table("", "torch.nn", "llmkern.nn", title="Result", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("optimizer", *(f"{one['optim']}.Adam" for one in (theirs, ours)))
    table.add_row("tokens/s", *(f"{one['tokens_per_second']:,.0f}" for one in (theirs, ours)))
    table.add_row("speed", "1×", f"{ratio['median']:.2f}×", style="bold")
    table.add_row("peak memory of training", *(_memory(one["peak_bytes"]) for one in (theirs, ours)))
    table.add_row("held-out perplexity", *(f"{one['perplexity']:.2f}" for one in (theirs, ours)))
    return table


def _spread(ratio: dict[str, float]) -> Text:
    said = f"The speed is the median of the pairs of segments; {_quartiles(ratio)}."
    if not _busy(ratio):
        return Text(said)
    return Text(
        f"{said}\nThat is a wide spread: other work keeps this machine busy. Run it again when it is idle.",
        style="yellow",
    )


def _busy(ratio: dict[str, float]) -> bool:
    return ratio["upper_quartile"] > 1.5 * ratio["lower_quartile"]


def _quartiles(ratio: dict[str, float]) -> str:
    half = f"{ratio['lower_quartile']:.2f}× to {ratio['upper_quartile']:.2f}×"
    return f"half of the pairs show {half}, the fastest segments {ratio['fastest']:.2f}×"


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _memory(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:,.0f} MiB"


def _draw_losses(axes: Axes, both: list[Runner]) -> None:
    """Every loss, faint, under a running mean."""
    for runner in both:
        steps = range(1, len(runner.losses) + 1)
        axes.plot(steps, runner.losses, **(STYLES[runner.name] | {"alpha": 0.25}))
    for runner in both:
        steps = range(1, len(runner.losses) + 1)
        axes.plot(steps, _running_mean(runner.losses), label=f"{runner.name}.nn", **STYLES[runner.name])
    axes.set_title("Loss", loc="left")
    axes.set_ylabel("cross-entropy of the next word")
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, both: list[Runner], facts: dict[str, Any]) -> None:
    # The loss is an fp32 number: what is nearer than this is equal.
    smallest = 1e-8
    apart = [max(value, smallest) for value in differences(both)]
    axes.plot(range(1, len(apart) + 1), apart, ".", color="#444444", markersize=3)
    axes.axhline(facts["agreement"]["largest_bound"], color="#444444", linestyle="--", linewidth=1, label="bound")
    axes.set_yscale("log")
    axes.set_ylim(smallest, 1)
    axes.set_title("How far the losses are apart, relative", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_speed(axes: Axes, both: list[Runner]) -> None:
    for runner in both:
        rates = [BATCH * WINDOW / seconds / 1e3 for seconds in runner.seconds]
        axes.plot(
            _segments(rates), rates, "o-", label=f"{runner.name}.nn", **(STYLES[runner.name] | {"linewidth": 1.6})
        )
    axes.set_ylim(bottom=0)
    axes.set_title("Speed", loc="left")
    axes.set_ylabel(f"thousand tokens/s, per {SEGMENT} steps")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)


def _draw_ratios(axes: Axes, both: list[Runner], facts: dict[str, Any]) -> None:
    pairs, ratio = ratios(both), facts["ratio"]
    # A pair that other work tore apart would flatten the rest; it is drawn at the upper edge.
    top = max(1.5, 2 * ratio["upper_quartile"])
    heights = [min(pair, top) for pair in pairs]
    axes.plot(_segments(pairs), heights, "o", color=STYLES["llmkern"]["color"], markersize=4, clip_on=False)
    axes.axhline(ratio["median"], color=STYLES["llmkern"]["color"], linewidth=1.2)
    axes.axhspan(ratio["lower_quartile"], ratio["upper_quartile"], color=STYLES["llmkern"]["color"], alpha=0.12)
    axes.axhline(1, color=STYLES["torch"]["color"], linewidth=2)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter("{x:g}×")
    axes.set_title("llmkern's speed over torch's: pairs, median, quartiles", loc="left", fontsize=10)


def _segments(values: list[float]) -> list[float]:
    """The middle step of every segment."""
    return [SEGMENT * (i + 0.5) for i in range(len(values))]


def _running_mean(values: list[float]) -> list[float]:
    """Means of as many neighbours before as after, fewer at the ends, so that a falling curve is not shifted."""
    last = len(values) - 1
    reach = [min(i, last - i, len(values) // 40) for i in range(len(values))]
    return [statistics.fmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
