"""The benchmark suite end to end on tiny cases, and its bookkeeping."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from llmkern.benchmarks import (
    bench_cross_entropy,
    bench_embedding,
    bench_embedding_bag,
    bench_fused_embedding,
    bench_linear,
    bench_linear_cross_entropy,
    bench_model,
    bench_mse_loss,
    bench_optim,
    bench_quantized_embedding,
    bench_rnn,
    bench_scaling,
    compare,
    machine,
    peers,
    report,
    result,
    suite,
    worker,
)
from llmkern.benchmarks.result import OURS, Measurement, Result, Row
from llmkern.benchmarks.runner import Plan, Runner, WorkerError, distance
from typer.testing import CliRunner

from llmkern.cli import app

ROOT = Path(__file__).parents[1]
BOTH = ("forward", "forward+backward")
TINY = [
    *(bench_cross_entropy.make(8, 50, variant) for variant in ("", "smoothing", "soft", "weight")),
    *(bench_linear_cross_entropy.make(8, 5, 50, ignored) for ignored in (0.0, 0.5)),
    *(bench_rnn.make(kind, 4, 3, 5, 6, 2) for kind in ("LSTM", "GRU", "RNN")),
    *(bench_rnn.make("LSTM", 8, 3, 5, 6, 1, variant) for variant in ("packed", "bidirectional", "proj")),
    bench_rnn.make_steps("tiny/cell", "LSTMCell", 3, 2, 5, 6, BOTH),
    bench_rnn.make_steps("tiny/decode", "LSTM", 3, 1, 5, 6, ("forward",)),
    *(bench_embedding.make(20, 4, 9, kind) for kind in bench_embedding.KINDS),
    *(bench_embedding.make_step(20, 4, 9, "zipf", sparse) for sparse in (False, True)),
    *(bench_embedding_bag.make(20, 4, 5, 3, mode) for mode in ("sum", "mean", "max")),
    *(bench_fused_embedding.make(model, 20, 7, 4, 3, 5) for model in bench_fused_embedding.MODELS),
    bench_quantized_embedding.make(20, 6, 9, 8),
    bench_linear.make(5, 7, 9),
    bench_mse_loss.make(5, 7),
    *(bench_optim.make(name, ((5, 4), (3,))) for name in ("Adam", "AdamW", "Adagrad")),
    bench_optim.make("SGD", ((5, 4), (3,)), momentum=0.9),
    bench_optim.make("Adam", ((5, 4), (3,)), clip=1.0),
    *(bench_optim.make_sparse(name, (9, 5), 12) for name in ("SGD", "Adagrad", "SparseAdam", "RowWiseAdagrad")),
    bench_model.make("tiny/model", 30, 6, (5, 4), 3, 2),
    bench_scaling.point(bench_rnn.make("LSTM", 4, 3, 5, 6), "T", 4),
    bench_scaling.point(bench_cross_entropy.make(8, 50), "threads", 1, 1),
]
TINY_RUNS = [suite.Run(case, phase, "fp32") for case in TINY for phase in case.phases]


def _error(implementation: peers.Implementation, run: suite.Run) -> float | None:
    reference = peers.load("reference").setup(run, "cpu")()
    results = implementation.setup(run, "cpu")()
    implementation.wait(results)
    assert results.keys() & reference.keys()
    return distance(worker.fingerprint(results), worker.fingerprint(reference))


@pytest.mark.parametrize("run", TINY_RUNS, ids=lambda run: run.id)
def test_every_kind_of_case_runs_and_matches(run: suite.Run) -> None:
    for name in ("torch", "llmkern"):
        error = _error(peers.load(name), run)
        assert error is not None
        assert error < 1e-5, name
    assert run.cost.flops + run.cost.reads + run.cost.writes > 0


PEERS = [name for name in peers.BASES if name not in ("llmkern", "torch", "torch.compile", "reference")]
HERE = [(n, run) for n in PEERS if not peers.not_here(n, "cpu") for run in TINY_RUNS if not peers.has_no(n, run)]


@pytest.mark.parametrize(("name", "run"), HERE, ids=[f"{name}-{run.id}" for name, run in HERE])
def test_every_installed_peer_matches(name: str, run: suite.Run) -> None:
    try:
        error = _error(peers.load(name), run)
    except peers.AbsentError as reason:
        pytest.skip(str(reason))
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_compared_with_the_same_inputs(dtype: str) -> None:
    run = suite.Run(bench_embedding.make(20, 4, 9), "forward", dtype)
    assert _error(peers.load("llmkern"), run) == 0


def test_a_fingerprint_sees_an_error() -> None:
    x = torch.randn(100_000)
    wrong = x.clone()
    wrong[70_017] += 1
    error = distance(worker.fingerprint({"x": wrong}), worker.fingerprint({"x": x}))
    assert error is not None
    assert 0.3 < error * float(x.norm()) < 3
    assert distance(worker.fingerprint({"x": x}), worker.fingerprint({"x": x})) == 0
    assert math.isnan(distance(worker.fingerprint({"x": x / 0}), worker.fingerprint({"x": x})) or 0)


def test_the_issue_cases_are_there() -> None:
    names = {case.name: case for case in suite.load_cases()}
    lstm = ("32x64x256x128x1", "128x32x512x512x1", "128x32x512x512x2", "256x8x1024x1024x1", "100x1x256x256x1")
    lstm += ("35x20x650x650x2", "70x80x1150x1150x1")
    wanted = [f"lstm/{s}" for s in lstm] + [f"{kind}/{lstm[i]}" for kind in ("gru", "rnn") for i in (0, 1, 5)]
    wanted += [f"lstm/128x32x512x512x1/{variant}" for variant in ("packed", "bidirectional", "proj")]
    wanted += ["lstmcell/128x32x512x512", "lstm/decode/1x1x512x512", "model/article", "model/lm"]
    sizes = ("4096x32000", "1024x128256", "1280x10000")
    wanted += [f"cross_entropy/{s}{variant}" for s in sizes for variant in ("", "/smoothing", "/soft", "/weight")]
    sizes = ("1024x512x32000", "1024x1024x32000", "512x2048x128256", "1280x128x10000")
    wanted += [f"linear_cross_entropy/{s}{ignored}" for s in sizes for ignored in ("", "/ignored=50%")]
    sizes = ("10000x256x1280", "32000x512x8192", "128256x2048x8192")
    kinds, steps = ("", "/zipf", "/same"), ("", "/adam", "/adam/sparse")
    wanted += [f"embedding/{s}{kind}{step}" for s in sizes for kind in kinds for step in steps]
    wanted += [f"embedding_bag/1000000x128x8192x20/{mode}" for mode in ("sum", "mean", "max")]
    assert set(wanted) <= names.keys()
    assert all(names[name].dtypes == ("fp32", "bf16") for name in wanted if not name.endswith("sparse"))
    assert {case.scaling[1] for case in names.values() if case.scaling} == {"T", "B", "V", "N", "threads"}


def test_selecting() -> None:
    assert {run.case.op for run in suite.select(ops=["rnn"])} == {"rnn"}
    assert {run.dtype for run in suite.select(quick=True)} == {"fp32"}
    assert {run.dtype for run in suite.select(device="cuda")} == {"fp32", "bf16", "fp16"}
    assert [run.id for run in suite.select(patterns=["model/article"], dtypes=["bf16"])] == ["model/article/bf16/step"]
    for bad in ({"ops": ["lstm"]}, {"patterns": ["nope*"]}, {"dtypes": ["int8"]}, {"phases": ["sideways"]}):
        with pytest.raises(suite.UnknownNameError, match="known: "):
            suite.select(**bad)
    assert peers.expand(["torch*"]) == [name for name in peers.known() if name.startswith("torch")]
    for bad in ("torhc", "nope*", "torch+nope"):
        with pytest.raises(suite.UnknownNameError, match=r"torch\.compile"):
            peers.expand([bad])


def test_the_floor() -> None:
    limits = {"fp32": 100.0, "read": 10.0, "store": 5.0}
    assert machine.floor(suite.Cost(1e9, 1, 1), "fp32", limits) == (pytest.approx(0.01), "flops")
    assert machine.floor(suite.Cost(1, 1e9, 1e9), "fp32", limits) == (pytest.approx(0.3), "bytes")
    assert machine.floor(suite.Cost(1, 1, 1), "fp32", {}) is None


def test_a_limit_is_the_best_of_before_and_after() -> None:
    row = replace(_row(2.0), flops=1e9, floor=0.1, bound="flops")
    measured = Result({}, {"fp32": 10.0, "read": 10.0, "store": 10.0}, [row, replace(row, floor=None)])
    machine.raise_limits(measured, {"fp32": 100.0, "read": 5.0})
    assert measured.limits == {"fp32": 100.0, "read": 10.0, "store": 10.0}
    assert row.floor == pytest.approx(0.01)
    assert measured.rows[1].floor is None, "a row on fewer threads has none"


def _row(ratio: float, spread: float = 0.01, name: str = "a") -> Row:
    ours = Measurement(median=1.0, low=1 - spread, high=1 + spread, ratio=1.0, match=True, error=1e-7)
    peer = Measurement(median=ratio, low=ratio, high=ratio, ratio=ratio)
    results = {OURS: ours, "torch": replace(peer, ratio=ratio * 2), "torch+thp": peer}
    return Row(f"{name}/fp32/forward", "a", name, "fp32", "forward", {}, 1.0, 1.0, 0.0, quick=True, results=results)


def test_the_best_variant_of_a_peer_counts() -> None:
    row = _row(0.9)
    assert row.best() == row.best("torch") == ("torch+thp", 0.9)
    assert row.behind
    assert report.ratio_text(row, "torch") == "0.90×ᵗ ▼"
    assert result.peers_of([row]) == ["torch"]
    assert result.peer_of("torch+tf32") == "torch+tf32", "another precision is another peer"


def test_comparing() -> None:
    (slower,) = compare.compare([_row(2.0)], [_row(1.5)])
    assert slower.verdict == "slower"
    assert math.isclose(slower.factor, 0.75)
    assert compare.compare([_row(1.5)], [_row(2.0)])[0].verdict == "faster"
    assert compare.compare([_row(2.0, spread=0.4)], [_row(1.8, spread=0.4)])[0].verdict == "same"
    broken = _row(2.0)
    broken.results[OURS] = Measurement(reason="RuntimeError: no")
    assert compare.compare([_row(2.0)], [broken])[0].verdict == "failed"


def _bench(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_command_line_end_to_end(tmp_path: Path) -> None:
    file, page = tmp_path / "new" / "r.json", tmp_path / "page.html"
    arguments = ["--case", "mse_loss/4096x1024", "--phase", "forward+backward", "--dtype", "fp32", "--rounds", 2]
    arguments += ["--against", "torch,torch+hugepages,openvino,liger-kernel"]
    output = _bench(*arguments, "--json", file, "--html", page, "--plot", tmp_path / "plots")
    assert "mse_loss/4096x1024" in output
    assert "no version of mse_loss" in output or "is not installed" in output
    measured = result.load(file)
    assert measured.environment["torch"] == torch.__version__
    assert measured.limits["fp32"] > 0
    (row,) = measured.rows
    assert row.ours.match, "the kernel's numbers differ from the reference's"
    assert row.results["torch"].ratio
    assert row.results["liger-kernel"].absent
    gradient = 4096 * 1024 * 4
    for name in (OURS, "torch"):
        assert gradient * 0.95 < (row.results[name].peak or 0) < 4 * gradient, name
    assert row.share is not None
    assert row.share > 0
    assert "mse_loss/4096x1024" in page.read_text()
    assert (tmp_path / "plots" / "ratios-mse_loss-fp32.png").stat().st_size > 5000
    assert "0 slower" in _bench("compare", file, file, "--fail-below", 0.9)
    content = json.loads(file.read_text())
    content["rows"][0]["results"]["torch"]["ratio"] /= 30
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["bench", "compare", str(file), str(worse), "--fail-below", "0.9"])
    assert done.exit_code == 1, done.output
    _bench("page", page, file, worse)
    assert page.read_text().count("<section>") == 2
    assert "mse_loss/4096x1024" in _bench("table", file)
    _bench("plots", tmp_path, file)
    assert (tmp_path / "roofline.png").exists()
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nz\n")
    _bench("readme", file, "--readme", readme)
    text = readme.read_text()
    assert text.startswith(f"a\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nz\n")
    assert "| mse_loss/4096x1024 fp32 fwd+bwd |" in text
    assert report.source_in(text) == "new/r.json"


def test_readme_says_what_the_committed_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.split(report.BEGIN)[1].split(report.END)[0]
    source = report.source_in(section)
    if source is None:
        pytest.skip("no results in README yet")
    wanted = report.readme_section(result.load(ROOT / source), source)
    assert section.strip() == wanted.strip(), f"run: python -m llmkern bench readme {source}"


def test_readme_section_shows_where_we_lose() -> None:
    rows = [_row(2.0), _row(0.5, name="b"), replace(_row(0.5, name="c"), quick=False)]
    environment = dict.fromkeys(result.ENVIRONMENT) | {"cpu": "x", "memory": 1, "cache": 1, "load": 0.0, "peers": {}}
    section = report.readme_section(Result(environment | {"date": "2026-01-01T00:00"}, {}, rows), "r.json")
    assert "2 of 3 runs" in section
    assert "`c/fp32/forward`: torch+thp takes 0.50×" in section
    assert "| c fp32 fwd" not in section


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--case", "nope"], "known: "),
        (["--op", "nope"], "known: "),
        (["--against", "nope"], "known: "),
        (["--device", "nope"], "known: "),
        (["--quick", "--phase", "step", "--op", "cross_entropy"], "--list"),
        (["--json", "/proc/nope/r.json"], "cannot be made"),
        (["--html", "/proc"], "is a folder"),
        (["compare", "missing.json", "missing.json"], "No such file"),
        (["compare", "missing.json", "missing.json", "--peer", "nope"], "known: "),
        (["page", "x.html", "missing.json"], "No such file"),
        (["table", "missing.json"], "No such file"),
        (["readme", "missing.json"], "No such file"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_document_without_markers_is_told(tmp_path: Path) -> None:
    document, file = tmp_path / "x.md", tmp_path / "r.json"
    document.write_text("nothing\n")
    environment = dict.fromkeys(result.ENVIRONMENT)
    result.save(file, Result(environment, {}, []))
    done = CliRunner().invoke(app, ["bench", "readme", str(file), "--readme", str(document)])
    assert done.exit_code == 2
    assert "expected the lines" in done.output


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"format": 99, "rows": []}', '{"format": 3, "rows": [1]}'])
def test_a_result_file_is_checked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(result.ResultFileError, match=r"x\.json"):
        result.load(path)


def test_a_peer_that_fails_is_a_row_with_its_reason() -> None:
    (run,) = suite.select(patterns=["mse_loss/4096x1024"], dtypes=["fp32"], phases=["forward"])
    with Runner(Plan((OURS, "torch"), rounds=1, slice=0.01, memory=False), {}) as runner:
        runner._worker("torch").close()
        row = runner.row(run)
        assert "ended" in (row.results["torch"].reason or "")
        assert row.ours.median
        assert runner.row(run).results["torch"].ratio, "the next run has a new worker"
        with pytest.raises(WorkerError, match="unknown case"):
            runner._worker(OURS).ask(do="setup", run="no/such/case")
        runner._worker(OURS)._patience = 0.05
        with pytest.raises(WorkerError, match="no answer"):
            runner._worker(OURS).ask(do="setup", run="model/lm/fp32/step")


class _Worker:
    """Stands for a worker process of which two fit into memory."""

    alive: ClassVar[set[_Worker]] = set()

    def ask(self, do: str, **_: object) -> dict[str, object]:
        if do == "time":
            return {"times": [1.0]}
        (self.alive.discard if do == "drop" else self.alive.add)(self)
        assert len(self.alive) <= 2
        return {"fingerprint": {"x": [1.0, 1.0]}, "held": 60, "free": 100}


def test_workers_take_turns_in_groups_that_fit_into_memory() -> None:
    runner = Runner(Plan((OURS, "torch", "torch+thp", "torch.compile"), rounds=1, memory=False), {})
    runner._worker = {name: _Worker() for name in (*runner.plan.implementations, "reference")}.__getitem__  # type: ignore
    (run,) = suite.select(patterns=["mse_loss/4096x1024"], dtypes=["fp32"], phases=["forward"])
    _Worker.alive.clear()
    runner._drop = lambda name: runner._worker(name).ask(do="drop")  # type: ignore
    assert [m.ratio for m in runner.row(run).results.values()] == [1.0] * 4
    assert not _Worker.alive


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second run; it stands in for the key, so that it does not come before a row, or after the last."""
    file, measure = tmp_path / "r.json", Runner.row
    rows: list[Row] = []

    def row(self: Runner, run: suite.Run, progress: Callable[[str], None]) -> Row:
        if rows:
            signal.raise_signal(signal.SIGINT)
        rows.append(measure(self, run, progress))
        return rows[0]

    monkeypatch.setattr(Runner, "row", row)
    monkeypatch.setattr(machine, "limits", lambda device: {})
    arguments = ["--op", "mse_loss,optim", "--rounds", "1", "--no-memory", "--against", "torch", "--json", str(file)]
    # A process that was started in the background ignores the key.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = CliRunner().invoke(app, ["bench", *arguments])
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130, done.output
    assert "interrupted after 1 of " in done.output
    assert rows[0].id in done.output
    assert result.load(file).rows == rows


def test_pytest_runs_the_same_cases() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-v", "--benchmark-disable", "-k", "mse_loss"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_reference_implementation_is_fp64() -> None:
    run = replace(suite.select(patterns=["mse_loss/4096x1024"])[0], phase="forward")
    results = peers.load("reference").setup(run, "cpu")()
    assert results["loss"].dtype == torch.float64
