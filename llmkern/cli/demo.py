"""``python -m llmkern demo``: one model trained twice on real text, with torch.nn and with llmkern.nn."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .demo_data import Corpus
    from .demo_train import Runner, Settings


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


def demo(
    epochs: Annotated[float, typer.Option(help="Passes over the text, for each implementation.")] = 6.0,
    text: Annotated[Path | None, typer.Option(help="A text file; by default Python's own reference manual.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.cpu,
    quick: Annotated[bool, typer.Option("--quick", help="40 steps, whatever --epochs says.")] = False,
    seed: Annotated[int, typer.Option(help="Of the parameters, the batches and the sample.")] = 0,
    prompt: Annotated[str, typer.Option(help="What the generated paragraph starts with.")] = "The value of the",
    out: Annotated[Path, typer.Option(help="Where demo_report.png and demo_report.json go.")] = Path("."),
) -> None:
    """Train one model twice on real text, with torch.nn and with llmkern.nn, and compare.

    The losses must agree to rounding (exit code 1 if not). Ctrl-C ends the training early and reports what there is.
    """
    from rich.console import Console

    from .demo_data import DemoError, load_corpus
    from .demo_train import SEGMENT, Settings, agreement, runners

    console = Console()
    try:
        settings = Settings(_checked(device), bf16, seed)
        _make_folder(out)
        corpus = load_corpus(text)
        both = runners(settings)
    except DemoError as error:
        typer.echo(f"demo: {error}", err=True)
        raise typer.Exit(2) from None

    steps = 4 * SEGMENT if quick else max(SEGMENT, round(epochs * corpus.steps_per_epoch))
    complete = _train(console, both, corpus, steps)
    if not all(runner.seconds for runner in both):
        typer.echo("demo: interrupted before both implementations were measured; there is nothing to report", err=True)
        raise typer.Exit(130)
    try:
        _report(console, both, corpus, settings, prompt, out, complete)
    except DemoError as error:
        typer.echo(f"demo: {error}", err=True)
        raise typer.Exit(2) from None
    if not agreement(both).holds:
        raise typer.Exit(1)
    if not complete:
        raise typer.Exit(130)


def peak(name: str, device: Device = Device.cpu, bf16: bool = False) -> None:
    """Measure the peak memory of one implementation; the demo starts this in a process of its own."""
    from .demo_train import Settings, measure_peak

    print(json.dumps({"bytes": measure_peak(name, Settings(device.value, bf16))}))


def _checked(device: Device) -> str:
    import torch

    from .demo_data import DemoError

    if device is Device.cuda and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return device.value


def _make_folder(out: Path) -> None:
    """Makes the folder and writes into it: four minutes later would be too late to find out."""
    import tempfile

    from .demo_data import DemoError

    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise DemoError(f"--out: {out} is no folder to write to: {error.strerror}") from error


def _train(console: Console, both: list[Runner], corpus: Corpus, steps: int) -> bool:
    """Trains under a live progress bar with both losses."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .demo_data import BATCH, VOCABULARY, WINDOW
    from .demo_train import train

    console.print(
        f"{corpus.name}: {len(corpus.train):,} words to train on, {len(corpus.held_out):,} held out,"
        f" {len(corpus.words):,} different; {VOCABULARY:,} rows in the model.\n"
        f"{steps} steps of {BATCH} × {WINDOW} words with each implementation, in turns.",
        highlight=False,
    )
    columns = [TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        tasks = {runner.name: progress.add_task(runner.name, total=steps, loss="") for runner in both}
        return train(
            both, corpus, steps, lambda name, loss: progress.update(tasks[name], advance=1, loss=f"{loss:.4f}")
        )


def _report(
    console: Console,
    both: list[Runner],
    corpus: Corpus,
    settings: Settings,
    prompt: str,
    out: Path,
    complete: bool,
) -> None:
    from .demo_model import generate
    from .demo_report import plot, show, summary, write_json
    from .demo_train import peak_memory

    with console.status("perplexity on the held-out text"):
        perplexity = [runner.perplexity(corpus.held_out) for runner in both]
    with console.status("peak memory, in fresh processes"):
        peaks = [peak_memory(runner.name, settings) if complete else None for runner in both]
    with console.status("a paragraph"):
        import torch

        generator = torch.Generator().manual_seed(settings.seed)
        start = corpus.encode(prompt) or [0]
        words = generate(both[1].model, start, 80, generator, torch.device(settings.device))
    facts = summary(both, corpus, perplexity, peaks, corpus.decode(start + words), complete)
    show(console, both, facts)
    written = [write_json(facts, out / "demo_report.json")]
    if (reason := plot(both, facts, out / "demo_report.png")) is None:
        written.append(out / "demo_report.png")
    else:
        console.print(f"no picture: {reason}", highlight=False)
    console.print("written: " + ", ".join(map(str, written)), highlight=False)
