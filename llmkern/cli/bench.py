"""``llmkern bench``: the benchmark suite, and comparisons of its result files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from ..benchmarks.runner import Row

bench = typer.Typer(help="Measure llmkern against its peers and the machine's limit.", invoke_without_command=True)

DEFAULT_PEERS = "torch,torch+hugepages,torch.compile,jax+hugepages"
QUICK_PEERS = "torch,torch+hugepages"


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
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16. Default: fp32 if --quick, else all.")] = None,
    phase: Annotated[str | None, typer.Option(help="forward, forward+backward, step. Default: all.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Peers, comma-separated; +hugepages and +thp are variants.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The quick set: under six minutes on two cores.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in fresh processes.")] = True,
    cold: Annotated[bool, typer.Option(help="Also time with flushed caches.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    list_: Annotated[bool, typer.Option("--list", help="List the selected cases and stop.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write a result file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report page.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write plots (PNG) into this folder.")] = None,
) -> None:
    """Runs the selected cases and prints one table. Interrupting keeps what was measured."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from ..benchmarks import machine, peers, report, suite
    from ..benchmarks.runner import OURS, Plan

    console = Console()
    try:
        runs = suite.select(_names(op), _names(case), _names(dtype), _names(phase), quick)
        names = _names(against) or _names(QUICK_PEERS if quick else DEFAULT_PEERS)
        for name in names:
            peers.split(name)
    except suite.UnknownNameError as error:
        _fail(error)
    if list_:
        for one in runs:
            console.print(one.id, highlight=False)
        return
    if not runs:
        _fail("no case has the selected dtype and phase")
    environment, limits = machine.environment(), machine.limits(device)
    plan = Plan((OURS, *dict.fromkeys(names)), device, rounds, memory=memory, cold=cold)
    rows, interrupted = _measure(console, plan, limits, runs)
    report.print_table(console, environment, limits, rows)
    _write(environment, limits, rows, json, html, plot)
    if interrupted:
        console.print(f"interrupted after {len(rows)} of {len(runs)} runs", style="yellow")
        raise typer.Exit(130)


def _measure(console: Any, plan: Any, limits: dict[str, float], runs: list[Any]) -> tuple[list[Row], bool]:
    """All rows, with a live display of the last one; what was measured survives an interruption."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..benchmarks.report import time_text
    from ..benchmarks.runner import OURS, Runner

    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar, Runner(plan, limits) as runner:
        task = bar.add_task("starting", total=len(runs))
        try:
            for row in runner.rows(runs, lambda text: bar.update(task, description=text)):
                rows.append(row)
                best = f", {row.best[1]:.2f}× {row.best[0]}" if row.best else ""
                bar.console.print(f"{row.id}: {time_text(row.results[OURS].median)}{best}", highlight=False)
                bar.advance(task)
        except KeyboardInterrupt:
            return rows, True
    return rows, False


def _write(
    environment: dict[str, Any],
    limits: dict[str, float],
    rows: list[Row],
    json: Path | None,
    html: Path | None,
    plot: Path | None,
) -> None:
    from ..benchmarks import report

    if json:
        report.save(json, environment, limits, rows)
    if html:
        from ..benchmarks.html import write_page

        write_page(html, [(environment, limits, rows)])
    if plot:
        from ..benchmarks.plots import write_plots

        write_plots(plot, limits, rows)


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="A newer result file.")],
    peer: Annotated[str, typer.Option(help="The peer whose same-run ratio is compared.")] = "torch",
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if a case's ratio fell below this factor of before (say 0.9)."),
    ] = None,
) -> None:
    """Says what got faster or slower between two result files, beyond noise."""
    from rich.console import Console
    from rich.table import Table

    from ..benchmarks import report
    from ..benchmarks.compare import compare as changes_of

    try:
        (_, _, old), (_, _, new) = report.load(before), report.load(after)
    except report.ResultFileError as error:
        _fail(error)
    changes = changes_of(old, new, peer)
    if not changes:
        _fail(f"the files have no case in common that was measured against {peer}")
    table = Table("case", "before", "after", "change", "noise", "", box=None)
    for c in changes:
        style = {"slower": "red", "faster": "green"}.get(c.verdict)
        cells = (
            c.id,
            f"{c.before:.2f}×",
            f"{c.after:.2f}×",
            f"{c.factor - 1:+.0%}",
            f"±{c.noise:.0%}",
            c.verdict,
        )
        table.add_row(*cells, style=style)
    Console().print(table)
    worst = changes[0]
    if fail_below is not None and worst.factor < fail_below and worst.verdict == "slower":
        raise typer.Exit(1)


@bench.command()
def page(
    out: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    results: Annotated[list[Path], typer.Argument(help="Result files, any number.")],
) -> None:
    """Makes one report page of any number of result files."""
    from ..benchmarks import report
    from ..benchmarks.html import write_page

    try:
        write_page(out, [report.load(path) for path in results])
    except report.ResultFileError as error:
        _fail(error)


@bench.command()
def table(
    results: Annotated[Path, typer.Argument(help="A result file.")],
    readme: Annotated[
        Path | None, typer.Option(help="Replace what stands between the benchmark markers of this file.")
    ] = None,
) -> None:
    """Prints a result file as a Markdown table, or puts it into a document (README's numbers come from here)."""
    from ..benchmarks import report

    try:
        text = report.markdown(*report.load(results))
    except report.ResultFileError as error:
        _fail(error)
    if readme is None:
        typer.echo(text)
        return
    begin, end = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
    document = readme.read_text()
    if begin not in document or end not in document:
        _fail(f"{readme} has no {begin} ... {end}")
    head, tail = document.split(begin)[0], document.split(end)[1]
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
