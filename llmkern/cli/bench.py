"""``llmkern bench``: the benchmark suite, and what is made of its result files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..benchmarks.result import Result, Row
    from ..benchmarks.runner import Plan
    from ..benchmarks.suite import Run

bench = typer.Typer(help="Measure llmkern against its peers and the machine's limit.", invoke_without_command=True)


def _fail(message: object) -> NoReturn:
    typer.echo(f"llmkern bench: {message}", err=True)
    raise typer.Exit(2)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@bench.callback()
def run(
    context: typer.Context,
    op: Annotated[str | None, typer.Option(help="Op stems, comma-separated. Default: all.")] = None,
    case: Annotated[str | None, typer.Option(help="Case names or shell patterns, comma-separated.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16. Default: one if --quick, else all.")] = None,
    phase: Annotated[str | None, typer.Option(help="forward, forward+backward, step. Default: all.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Peers or patterns, comma-separated: torch,torch+hugepages,jax*.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The quick set: under six minutes on two cores.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in fresh processes.")] = True,
    cold: Annotated[bool, typer.Option(help="Time what fits into a cache with flushed caches as well.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    list_: Annotated[bool, typer.Option("--list", help="List the selected cases and stop.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write a result file; it grows with every case.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report page.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write plots (PNG) into this folder.")] = None,
) -> None:
    """Runs the selected cases and prints one table. Interrupting keeps what was measured."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from ..benchmarks import machine, peers, report, suite
    from ..benchmarks.result import OURS, Result
    from ..benchmarks.runner import Plan

    console = Console()
    try:
        runs = suite.select(_names(op), _names(case), _names(dtype), _names(phase), quick, device)
        names = peers.expand(_names(against)) or peers.defaults(quick, device)
    except suite.UnknownNameError as error:
        _fail(error)
    if list_:
        for one in runs:
            typer.echo(one.id)
        return
    if not runs:
        _fail("no case has the selected dtype and phase; --list shows what a selection holds")
    _check_device(device)
    _check_targets(json, html, plot)
    console.print("the machine's limits...", style="dim")
    result = Result(machine.environment(), machine.limits(device), [])
    everyone = (OURS, *(name for name in names if name != OURS))
    plan = Plan(everyone, device, rounds, budget=10 if quick else 30, memory=memory, cold=cold)
    complete = _measure(console, plan, result, runs, json)
    if complete:
        # Something else may have run at the start.
        machine.raise_limits(result, machine.limits(device))
        _save(json, result)
    report.print_table(console, result)
    _write(result, html, plot)
    if not complete:
        console.print(f"interrupted after {len(result.rows)} of {len(runs)} runs", style="yellow")
        raise typer.Exit(130)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        _fail("--device cuda: torch sees no CUDA device here; use --device cpu")


def _check_targets(json: Path | None, html: Path | None, plot: Path | None) -> None:
    """Says now, not after an hour, that a file cannot be written."""
    for option, target, folder in (("--json", json, False), ("--html", html, False), ("--plot", plot, True)):
        if target is None:
            continue
        try:
            home = target if folder else target.parent
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _fail(f"{option}: {home} cannot be made: {error.strerror}")
        if not folder and target.is_dir():
            _fail(f"{option}: {target} is a folder; name a file")
        if not os.access(home, os.W_OK):
            _fail(f"{option}: {home} cannot be written to")


def _measure(console: Console, plan: Plan, result: Result, runs: list[Run], json: Path | None) -> bool:
    """Adds all rows, with a live display; what was measured survives an interruption, and is in the file at once."""
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..benchmarks.runner import Runner

    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar, Runner(plan, result.limits) as runner:
        task = bar.add_task("", total=len(runs))
        show: Callable[[str], None] = lambda text: bar.update(task, description=escape(text))  # noqa: E731
        try:
            for row in runner.rows(runs, show):
                result.rows.append(row)
                bar.console.print(_line(row), highlight=False, markup=False, style="yellow" if row.behind else None)
                bar.advance(task)
                _save(json, result)
        except KeyboardInterrupt:
            return False
    return True


def _save(json: Path | None, result: Result) -> None:
    from ..benchmarks.result import save

    if json:
        save(json, result)


def _line(row: Row) -> str:
    from ..benchmarks.report import time_text

    if row.ours.median is None:
        return f"{row.id}: failed: {row.ours.reason}"
    best = row.best()
    return f"{row.id}: {time_text(row.ours.median)}" + (f", best peer {best[0]} {best[1]:.2f}×" if best else "")


def _write(result: Result, html: Path | None, plot: Path | None) -> None:
    if html:
        from ..benchmarks.html import write_page

        write_page(html, [result])
    if plot:
        from ..benchmarks.plots import write_plots

        write_plots(plot, result)


def _load(path: Path) -> Result:
    from ..benchmarks.result import ResultFileError, load

    try:
        return load(path)
    except ResultFileError as error:
        _fail(error)


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="A newer result file.")],
    peer: Annotated[str, typer.Option(help="The peer whose same-run ratio is compared.")] = "torch",
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if a case's ratio fell below this factor of before (say 0.9), beyond noise."),
    ] = None,
) -> None:
    """Says what got faster or slower between two result files, beyond noise."""
    from rich.console import Console
    from rich.table import Table

    from ..benchmarks import peers
    from ..benchmarks.compare import compare as changes_of
    from ..benchmarks.suite import UnknownNameError

    try:
        peers.split(peer)
    except UnknownNameError as error:
        _fail(error)
    changes = changes_of(_load(before).rows, _load(after).rows, peer)
    if not changes:
        _fail(f"the files have no case in common that was measured against {peer}")
    table = Table("case", "before", "after", "change", "noise", "", box=None)
    for c in changes:
        style = {"slower": "red", "failed": "red", "faster": "green"}.get(c.verdict)
        after_text, change = (f"{c.after:.2f}×", f"{c.factor - 1:+.0%}") if c.after is not None else ("–", "–")
        table.add_row(c.id, f"{c.before:.2f}×", after_text, change, f"±{c.noise:.0%}", c.verdict, style=style)
    Console().print(table)
    verdicts = [c.verdict for c in changes]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("faster", "same", "slower", "failed"))
    typer.echo(f"ratios to {peer}, beyond noise: {counts}")
    lost = [c for c in changes if c.verdict in ("slower", "failed") and c.factor < (fail_below or 0)]
    if lost:
        typer.echo(f"{len(lost)} below {fail_below:g} of before, the worst {lost[0].id}", err=True)
        raise typer.Exit(1)


@bench.command()
def page(
    out: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    results: Annotated[list[Path], typer.Argument(help="Result files, any number.")],
) -> None:
    """Makes one report page of any number of result files."""
    from ..benchmarks.html import write_page

    loaded = [_load(path) for path in results]
    _check_targets(None, out, None)
    write_page(out, loaded)


@bench.command()
def plots(
    folder: Annotated[Path, typer.Argument(help="The folder to write PNGs into.")],
    result: Annotated[Path, typer.Argument(help="A result file.")],
) -> None:
    """Draws the plots of a result file."""
    from ..benchmarks.plots import write_plots

    loaded = _load(result)
    _check_targets(None, None, folder)
    for path in write_plots(folder, loaded):
        typer.echo(path)


@bench.command()
def table(result: Annotated[Path, typer.Argument(help="A result file.")]) -> None:
    """Prints a result file as a Markdown table."""
    from ..benchmarks.report import markdown

    typer.echo(markdown(_load(result)))


@bench.command()
def readme(
    result: Annotated[Path, typer.Argument(help="A result file.")],
    document: Annotated[
        Path, typer.Option("--readme", help="The document whose section between the benchmark markers is replaced.")
    ] = Path("README.md"),
) -> None:
    """Writes README's performance section from a result file."""
    from ..benchmarks.report import DocumentError, put_into

    try:
        put_into(document, _load(result), result)
    except DocumentError as error:
        _fail(error)
