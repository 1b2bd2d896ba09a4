"""The command line: what info says, and the demo from its text to its report.

Training is slow: one run goes from end to end in a process of its own, as a user's would; what a demo does with the
end of a training is tested with a training that is made up.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmkern import dispatch
from llmkern.cli import app, demo_data, demo_report, demo_train
from llmkern.cli.demo_model import build, generate

PNG = b"\x89PNG\r\n\x1a\n"
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "160"}

# `llmkern.cli.demo` is the command; its module is behind it.
demo_module = import_module("llmkern.cli.demo")


def run(*arguments: object) -> Any:
    return CliRunner(env=PLAIN).invoke(app, [str(argument) for argument in arguments])


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llmkern", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **PLAIN, **env}, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is just long enough."""
    path = tmp_path_factory.mktemp("text") / "manual.txt"
    path.write_text(demo_data.read_text(None)[0][:110_000], encoding="utf-8")
    return path


# The commands, and info.


def test_help_lists_the_commands() -> None:
    said = command("--help").stdout
    assert all(name in said for name in ("info", "demo", "bench"))
    assert "demo-peak" not in said
    options = run("demo", "--help").output
    assert all(option in options for option in ("--epochs", "--text", "--bf16", "--device", "--quick", "--out"))


def test_info_names_every_backend_and_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._unavailable, "triton", "broken [on] purpose")
    tables, facts = run("info").output, json.loads(run("info", "--json").output)
    assert list(facts["backends"]) == list(dispatch.BACKENDS)
    assert facts["backends"]["triton"] == "broken [on] purpose"
    assert facts["backends"]["torch"] is None
    assert facts["torch"] == str(torch.__version__)
    assert set(facts["ops"]) == set(dispatch.TABLE)
    assert "no: broken [on] purpose" in tables
    assert all(name in tables for name in (*dispatch.BACKENDS, *dispatch.TABLE, facts["torch"]))


def test_info_says_why_an_unknown_instruction_set_is_refused() -> None:
    if (reason := dispatch.unavailable("native")) is not None:
        pytest.skip(f"native: {reason}")
    reason = "LLMKERN_CPU_ISA=nonsense; expected baseline, avx2 or avx512"
    tables = command("info", LLMKERN_CPU_ISA="nonsense")
    assert (tables.returncode, tables.stderr) == (0, "")
    assert reason in tables.stdout
    facts = json.loads(command("info", "--json", LLMKERN_CPU_ISA="nonsense").stdout)
    assert facts["isa"] is None
    assert facts["backends"]["native"] == reason


# The demo's text.


def test_what_was_split_is_joined_to_readable_text() -> None:
    sentences = 'if "x" is none, __init__ (self, max_value) isn\'t called; see [1].\nthe "yield" ... expression: 10%!'
    assert demo_data.join(demo_data.tokenize(sentences.replace("\n", "\n  \n\n"))) == sentences
    wrapped = demo_data.tokenize("Two\n  lines.\n\nA_b2's  ==\n")
    assert wrapped == ["two", "lines", ".", "\n", "a_b2's", "=="]


def test_the_vocabulary_is_a_function_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    # The held-out tenth has a word of its own: the vocabulary must not know it.
    path.write_text("b a " * 10_000 + "c " * 2_500 + "d " * 2_500)
    corpus = demo_data.load_corpus(path)
    assert corpus.words == ["<unk>", "a", "b", "c"]
    assert corpus.train.tolist() == [2, 1] * 10_000 + [3] * 2_500
    assert corpus.held_out.tolist() == [0] * 2_500
    assert corpus.encode("a Z b") == [1, 0, 2]
    assert corpus.decode([1, 3]) == "a c"


def test_batches_are_shuffled_windows_and_their_next_words() -> None:
    ids = torch.arange(64 * 32 * 3 + 40)

    def some(seed: int, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(islice(demo_data.batches(ids, torch.Generator().manual_seed(seed)), count))

    for words, targets in some(0):
        assert words.shape == targets.shape == (demo_data.BATCH, demo_data.WINDOW)
        # The text counts up: each window does, and each target is the word after.
        assert torch.equal(words, words[:, :1] + torch.arange(demo_data.WINDOW))
        assert torch.equal(targets, words + 1)
    firsts = torch.cat([words[:, 0] for words, _ in some(0, 3)])
    assert len(firsts.unique()) == len(firsts)
    assert not torch.equal(firsts, firsts.sort().values)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(some(0), some(0), strict=True))
    assert not torch.equal(some(0)[0][0], some(1)[0][0])


# The demo's model and training.


def test_generation_is_repeatable_and_never_yields_unk() -> None:
    class LovesUnknown(torch.nn.Module):
        def forward(self, words: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, int]:
            logits = torch.zeros(*words.shape, 50)
            logits[..., 0] = 100.0
            return logits, (state or 0) + words.shape[1]

    def words(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return generate(LovesUnknown(), [0, 3], 60, generator, torch.device("cpu"))

    assert len(words(0)) == 60
    assert all(0 < word < 50 for word in words(0))
    assert len(set(words(0))) > 5
    assert words(0) == words(0) != words(1)


def test_models_that_start_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter((0, 1))
    monkeypatch.setattr(demo_train, "build", lambda nn, seed: build(nn, next(seeds)))
    with pytest.raises(demo_data.DemoError, match=r"do not start from equal parameters: .*encoder\.weight_ih_l0"):
        demo_train.runners(demo_train.Settings())


def test_training_takes_turns_and_keeps_what_ctrl_c_leaves(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_train, "SEGMENT", 1)
    both = demo_train.runners(demo_train.Settings(seed=3))
    corpus = demo_data.load_corpus(text)
    order: list[str] = []

    def on_step(name: str, loss: float) -> None:
        order.append(name)
        assert math.isfinite(loss)
        if len(order) == 5:
            raise KeyboardInterrupt

    assert not demo_train.train(both, corpus, 9, on_step)
    assert order == ["torch", "llmkern", "llmkern", "torch", "torch"]
    assert [len(runner.losses) for runner in both] == [3, 2]
    assert [len(runner.seconds) for runner in both] == [2, 2]
    assert len(demo_train.ratios(both)) == 2
    assert demo_train.agreement(both).holds


def curves(theirs: list[float], ours: list[float], bf16: bool = False) -> list[Any]:
    settings = demo_train.Settings(bf16=bf16)
    return [
        SimpleNamespace(name=name, losses=losses, settings=settings)
        for name, losses in (("torch", theirs), ("llmkern", ours))
    ]


def test_agreement_is_strict_at_first_and_wider_later() -> None:
    even, n = [2.0] * 30, demo_train.SEGMENT
    assert demo_train.agreement(curves(even, even)).holds
    early, late, far = ([*even[:i], 2.0 * (1 + by), *even[i + 1 :]] for i, by in ((3, 2e-5), (n, 2e-5), (n, 6e-2)))
    assert not demo_train.agreement(curves(even, early)).holds
    assert demo_train.agreement(curves(even, early, bf16=True)).holds
    assert demo_train.agreement(curves(even, late)).holds
    assert not demo_train.agreement(curves(even, far)).holds
    assert demo_train.agreement(curves(even, far)).largest == pytest.approx(6e-2)
    for broken in (math.nan, math.inf):
        assert not demo_train.agreement(curves(even, [*even[:20], broken])).holds


# The demo's requests that it cannot serve.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--text", "{tmp}/missing.txt"), "--text: {tmp}/missing.txt cannot be read: No such file or directory"),
        (("--text", "{tmp}"), "--text: {tmp} cannot be read: Is a directory"),
        (("--text", "{tmp}/short.txt"), "the text has 3 words; the demo needs 21,120 or more"),
        (("--device", "cuda"), "--device cuda: torch sees no CUDA device here; use --device cpu"),
        (("--out", "{tmp}/short.txt"), "--out: {tmp}/short.txt is no folder to write to: File exists"),
        (("--out", "{tmp}/short.txt/sub"), "--out: {tmp}/short.txt/sub is no folder to write to: Not a directory"),
    ],
)
def test_a_bad_request_is_one_line(
    arguments: tuple[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("three short words")
    result = run("demo", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr == f"demo: {complaint.format(tmp=tmp_path)}\n"
    assert result.stdout == ""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that root cannot write to either")
def test_a_folder_without_write_access_is_refused_before_training(text: Path) -> None:
    result = run("demo", "--text", text, "--out", "/proc")
    assert result.exit_code == 2
    assert re.fullmatch(r"demo: --out: /proc is no folder to write to: .+\n", result.stderr)
    assert result.stdout == ""


def test_an_unknown_device_is_refused_with_the_choices() -> None:
    result = run("demo", "--device", "tpu")
    assert result.exit_code == 2
    assert all(word in result.stderr for word in ("tpu", "cpu", "cuda"))
    assert "Traceback" not in result.stderr


# The demo's report.


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the training: llmkern is twice as fast and loses `factor` times as much."""
    wanted: dict[str, Any] = {"factor": 1.0, "complete": True}

    def train(console: Any, both: list[Any], corpus: Any, steps: int) -> bool:
        for runner, seconds, factor in zip(both, (0.2, 0.1), (1.0, wanted["factor"]), strict=True):
            runner.losses = [factor * 9.0 / (i + 1) for i in range(steps)]
            runner.seconds = [seconds * (1 + i % 2) for i in range(steps // demo_train.SEGMENT)]
        return bool(wanted["complete"])

    monkeypatch.setattr(demo_module, "_train", train)
    monkeypatch.setattr(demo_train, "peak_memory", lambda name, settings: 3 << 20)
    return wanted


def made_up_demo(text: Path, out: Path) -> Any:
    return run("demo", "--quick", "--text", text, "--out", out)


def test_a_report_that_agrees(made_up: dict[str, Any], text: Path, tmp_path: Path) -> None:
    result = made_up_demo(text, tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "The curves agree to fp32 rounding" in result.stdout
    assert "2.00×" in result.stdout
    assert "3 MiB" in result.stdout
    facts = json.loads((tmp_path / "demo_report.json").read_text())
    assert facts["ratio"] == pytest.approx(dict.fromkeys(("median", "lower_quartile", "upper_quartile", "fastest"), 2))
    assert [one["tokens_per_second"] for one in facts["implementations"].values()] == pytest.approx(
        [2048 / 0.3, 2048 / 0.15]
    )


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"factor": 1.001}, 1, "The curves DIFFER beyond fp32 rounding"),
        ({"factor": math.nan}, 1, "The curves DIFFER beyond fp32 rounding"),
        ({"complete": False}, 130, "Interrupted: the report covers 40 steps"),
    ],
)
def test_a_report_of_what_went_wrong(
    change: dict[str, Any], code: int, said: str, made_up: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    made_up.update(change)
    result = made_up_demo(text, tmp_path)
    assert result.exit_code == code, result.output
    assert said in result.stdout
    facts = json.loads((tmp_path / "demo_report.json").read_text(), parse_constant=pytest.fail)
    assert facts["complete"] is made_up["complete"]
    assert facts["agreement"]["holds"] is (code != 1)
    assert (tmp_path / "demo_report.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("made_up")
def test_a_report_that_cannot_be_written_is_one_line(text: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "demo_report.json"
    blocked.mkdir()
    result = made_up_demo(text, tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"demo: --out: {blocked} cannot be written: Is a directory\n"
    # Nothing half-written stays.
    assert list(tmp_path.iterdir()) == [blocked]


@pytest.mark.usefixtures("made_up")
def test_a_picture_that_cannot_be_drawn_is_explained(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "demo_report.png"
    blocked.mkdir()
    result = made_up_demo(text, tmp_path)
    assert result.exit_code == 0
    assert f"no picture: {blocked} cannot be written: Is a directory" in result.stdout.replace("\n", "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = made_up_demo(text, tmp_path)
    assert result.exit_code == 0
    assert "no picture: matplotlib is not installed" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo_report.json", "demo_report.png"]


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "demo_report.json"
    path.write_text("before")
    assert demo_report.write_json({"ratio": math.inf, "losses": [1.5, math.nan]}, path) == path
    assert json.loads(path.read_text()) == {"ratio": None, "losses": [1.5, None]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The demo's output and its folder, after one real run. One thread: a busy machine stops two at every barrier."""
    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    result = command("demo", "--quick", "--text", text, "--out", out, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout, out


def test_the_demo_trains_both_to_the_same_losses(finished: tuple[str, Path]) -> None:
    facts = json.loads((finished[1] / "demo_report.json").read_text())
    assert facts["complete"]
    assert facts["agreement"]["holds"]
    assert facts["steps"] == 40
    theirs, ours = (facts["implementations"][name] for name in ("torch", "llmkern"))
    for one in (theirs, ours):
        assert len(one["losses"]) == 40
        assert len(one["seconds_per_step"]) == 4
        # ln(10000) at first: the model knows nothing.
        assert one["losses"][0] == pytest.approx(math.log(10_000), abs=0.1)
        assert max(one["losses"][-5:]) < one["losses"][0] - 2
        assert 1 < one["perplexity"] < 2_000
        assert one["tokens_per_second"] > 0
        assert one["peak_bytes"] > 10_000 * (256 + 128) * 4
    apart = [abs(a - b) / a for a, b in zip(theirs["losses"], ours["losses"], strict=True)]
    assert max(apart[:10]) == facts["agreement"]["first"] < facts["agreement"]["first_bound"] == 1e-5
    assert max(apart) == facts["agreement"]["largest"] < facts["agreement"]["largest_bound"] == 5e-2
    if dispatch.unavailable("native") is None:
        # Two sets of kernels, not one set twice.
        assert theirs["losses"] != ours["losses"]
    assert (theirs["optim"], ours["optim"]) == ("torch.optim", "llmkern.optim")
    assert facts["ratio"]["lower_quartile"] <= facts["ratio"]["median"] <= facts["ratio"]["upper_quartile"]


def test_the_demo_prints_and_draws_what_it_found(finished: tuple[str, Path]) -> None:
    said, out = finished
    facts = json.loads((out / "demo_report.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["demo_report.json", "demo_report.png"]
    assert (out / "demo_report.png").read_bytes().startswith(PNG)
    assert f"{facts['implementations']['llmkern']['losses'][-1]:.6f}" in said
    assert f"{facts['ratio']['median']:.2f}×" in said
    assert f"{facts['implementations']['torch']['perplexity']:.2f}" in said
    assert facts["paragraph"].startswith("the value of the")
    assert "<unk>" not in facts["paragraph"]
    assert "manual.txt" in said
