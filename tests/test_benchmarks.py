"""The benchmark suite end to end on tiny cases, and its bookkeeping."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llmkern.benchmarks import (
    bench_cross_entropy,
    bench_embedding,
    bench_linear_cross_entropy,
    bench_model,
    bench_mse_loss,
    bench_rnn,
    compare,
    machine,
    peers,
    report,
    suite,
    worker,
)
from llmkern.benchmarks.runner import OURS, Measurement, Row, WorkerError, _distance
from typer.testing import CliRunner

from llmkern.cli import app

TINY = [
    bench_cross_entropy._case(8, 50),
    bench_cross_entropy._case(8, 50, "smoothing"),
    bench_cross_entropy._case(8, 50, "soft"),
    bench_cross_entropy._case(8, 50, "weight"),
    bench_linear_cross_entropy._case(8, 5, 50),
    bench_linear_cross_entropy._case(8, 5, 50, 0.5),
    *(bench_rnn._case(kind, 4, 3, 5, 6) for kind in ("LSTM", "GRU", "RNN")),
    *(bench_rnn._case("LSTM", 8, 3, 5, 6, 1, variant) for variant in ("packed", "bidirectional", "proj")),
    bench_rnn._steps("tiny/cell", "LSTMCell", 3, 2, 5, 6, ("forward", "forward+backward")),
    bench_rnn._steps("tiny/decode", "LSTM", 3, 1, 5, 6, ("forward",)),
    *(bench_embedding._case(20, 4, 9, kind) for kind in ("uniform", "zipf", "same")),
    bench_embedding._step(20, 4, 9, False),
    bench_embedding._step(20, 4, 9, True),
    bench_mse_loss._case(5, 7),
    bench_model._case("tiny/model", 30, 6, (5, 4), 3, 2),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_kind_of_case_runs_and_matches(case: suite.Case) -> None:
    for phase in case.phases:
        results = {
            name: worker.fingerprint(case.setup(suite.namespace(name), phase, "cpu", torch.float32)())
            for name in ("torch", "llmkern")
        }
        assert results["torch"].keys() == results["llmkern"].keys() != set()
        error = _distance(results["llmkern"], results["torch"])
        assert error is not None
        assert error < 1e-5
        cost = case.cost(phase, 4)
        assert cost.flops + cost.reads + cost.writes > 0


def test_a_fingerprint_sees_an_error() -> None:
    x = torch.randn(1000)
    wrong = x.clone()
    wrong[17] += 1
    error = _distance(worker.fingerprint({"x": wrong}), worker.fingerprint({"x": x}))
    assert error is not None
    assert 0.1 < error * float(x.norm()) < 10
    assert _distance(worker.fingerprint({"x": x}), worker.fingerprint({"x": x})) == 0


def test_the_issue_cases_are_there() -> None:
    names = {case.name for case in suite.load_cases()}
    assert {
        "lstm/32x64x256x128x1",
        "lstm/70x80x1150x1150x1",
        "gru/35x20x650x650x2",
        "lstm/128x32x512x512x1/packed",
        "cross_entropy/1024x128256",
        "linear_cross_entropy/512x2048x128256/ignored=50%",
        "embedding/128256x2048x8192/zipf",
        "model/article",
        "model/lm",
    } <= names


def test_selecting() -> None:
    assert {run.case.op for run in suite.select(ops=["rnn"])} == {"rnn"}
    assert {run.dtype for run in suite.select(quick=True)} == {"fp32"}
    assert [run.id for run in suite.select(patterns=["model/article"], dtypes=["bf16"])] == ["model/article/bf16/step"]
    for bad in ({"ops": ["lstm"]}, {"patterns": ["nope*"]}, {"dtypes": ["int8"]}, {"phases": ["sideways"]}):
        with pytest.raises(suite.UnknownNameError, match="known: "):
            suite.select(**bad)
    with pytest.raises(suite.UnknownNameError, match=r"torch\.compile"):
        peers.split("torhc")


def test_the_floor() -> None:
    limits = {"fp32": 100.0, "read": 10.0, "store": 5.0}
    assert machine.floor(suite.Cost(1e9, 1, 1), "fp32", limits) == (pytest.approx(0.01), "flops")
    assert machine.floor(suite.Cost(1, 1e9, 1e9), "fp32", limits) == (pytest.approx(0.3), "bytes")
    assert machine.floor(suite.Cost(1, 1, 1), "fp32", {}) is None


def _row(ratio: float, spread: float = 0.01) -> Row:
    ours = Measurement(median=1.0, low=1 - spread, high=1 + spread, ratio=1.0)
    peer = Measurement(median=ratio, low=ratio, high=ratio, ratio=ratio)
    return Row("a/fp32/forward", "a", "a", "fp32", "forward", {}, 1.0, 1.0, results={OURS: ours, "torch": peer})


def test_comparing() -> None:
    (slower,) = compare.compare([_row(2.0)], [_row(1.5)])
    assert slower.verdict == "slower"
    assert math.isclose(slower.factor, 0.75)
    assert compare.compare([_row(1.5)], [_row(2.0)])[0].verdict == "faster"
    assert compare.compare([_row(2.0, spread=0.4)], [_row(1.8, spread=0.4)])[0].verdict == "same"


def test_command_line_end_to_end(tmp_path: Path) -> None:
    result, page = tmp_path / "r.json", tmp_path / "page.html"
    call = ["bench", "--case", "cross_entropy/1280x10000", "--phase", "forward", "--dtype", "fp32", "--rounds", "1"]
    call += ["--against", "torch", "--json", str(result), "--html", str(page), "--plot", str(tmp_path)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    environment, limits, rows = report.load(result)
    assert environment["torch"] == torch.__version__
    assert limits["fp32"] > 0
    (row,) = rows
    assert row.results[OURS].match, "the kernel's numbers differ from the reference's"
    assert row.results["torch"].ratio
    assert row.results[OURS].peak is not None
    assert 0 < row.share < 1.5
    assert "cross_entropy/1280x10000" in page.read_text()
    assert (tmp_path / "ratios.png").stat().st_size > 5000
    same = CliRunner().invoke(app, ["bench", "compare", str(result), str(result), "--fail-below", "0.9"])
    assert same.exit_code == 0, same.output
    content = json.loads(result.read_text())
    content["rows"][0]["results"]["torch"]["ratio"] /= 3
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(content))
    assert CliRunner().invoke(app, ["bench", "compare", str(result), str(worse), "--fail-below", "0.9"]).exit_code == 1
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nz\n")
    assert CliRunner().invoke(app, ["bench", "table", str(result), "--readme", str(readme)]).exit_code == 0
    assert "old" not in readme.read_text()
    assert "| cross_entropy/1280x10000/fp32/forward |" in readme.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--case", "nope"], "known: "),
        (["--op", "nope"], "known: "),
        (["--against", "nope"], "known: "),
        (["compare", "missing.json", "missing.json"], "No such file"),
    ],
)
def test_wrong_names_are_told(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert says in done.output


def test_a_peer_that_fails_is_a_row_with_its_reason() -> None:
    from llmkern.benchmarks.runner import Plan, Runner

    (run,) = suite.select(patterns=["mse_loss/4096x1024"], dtypes=["fp32"], phases=["forward"])
    with Runner(Plan((OURS, "torch"), rounds=1, slice=0.01, memory=False), {}) as runner:
        runner._worker("torch").close()
        row = runner.row(run)
    assert "ended" in (row.results["torch"].reason or "")
    assert row.results[OURS].median
    with pytest.raises(WorkerError), Runner(Plan((OURS,)), {}) as runner:
        runner._worker(OURS).ask(do="setup", run="no/such/case")


def test_a_result_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{", "{}", '{"format": 99, "rows": []}'):
        path.write_text(text)
        with pytest.raises(report.ResultFileError, match=r"x\.json"):
            report.load(path)


def test_the_reference_implementation_is_fp64() -> None:
    run = replace(suite.select(patterns=["mse_loss/4096x1024"])[0], phase="forward")
    results = peers.load("reference").setup(run, "cpu")()
    assert results["loss"].dtype == torch.float64
