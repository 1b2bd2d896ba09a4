"""The choice of a backend: its table, its errors, its explanations."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import llmkern
import llmkern.functional as LF
import llmkern.nn as lnn
from llmkern import dispatch
from llmkern._plain import TRANSFORMS

KERNEL_BACKENDS = ("native", "triton")
needs_native = pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="needs the native library")


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_table_is_sane(op: str) -> None:
    row = dispatch.TABLE[op]
    assert set(row) <= set(dispatch.BACKENDS)
    for name in set(row) & set(KERNEL_BACKENDS):
        support = row[name]
        assert support.devices
        assert support.devices <= {"cpu", "cuda"}
        assert support.dtypes
        assert all(dtype.is_floating_point for dtype in support.dtypes)
        assert all(option.isidentifier() for option in support.options)
    options = {option for support in row.values() for option in support.options}
    unserved = [o for o in options if all(support.lacks([o]) for support in row.values())]
    # A projection with clipping is served by the reference; what torch and the reference lack, by a kernel.
    assert not unserved, f"{op}: nobody serves {unserved}"
    assert not row["reference"].lacks([TRANSFORMS[0], "tensors of class Other"]), "what is strange is served by someone"


@pytest.mark.parametrize("name", [n for n in dispatch.BACKENDS if n != "torch"])
def test_backends_load_or_say_why(name: str) -> None:
    if (reason := dispatch.unavailable(name)) is None:
        assert dispatch.load(name) is importlib.import_module(dispatch._MODULES[name])
    else:
        assert isinstance(reason, str)
        assert reason


def test_unknown_backend_name() -> None:
    unknown = llmkern.backend("cudnn")
    with pytest.raises(ValueError, match=r"llmkern.backend: unknown backend 'cudnn'; expected one of auto, native"):
        unknown.__enter__()


def test_pick_takes_the_first_that_serves() -> None:
    weight = torch.randn(3, 2)
    names = [n for n in ("native",) if dispatch.unavailable(n) is None]
    assert dispatch.pick("embedding", weight) == (names or ["torch"])[0]
    assert dispatch.pick("embedding", weight, options=["rotation"]) == "torch"
    assert dispatch.pick("embedding", weight.to(torch.complex64)) == "torch"
    assert dispatch.pick("mse_loss", weight, weight.double()) == "torch"
    assert dispatch.pick("embedding", weight.to_sparse()) == "torch"


@needs_native
@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        ([torch.randn(3)], ["rotation"], "does not serve rotation"),
        ([torch.randn(3)], ["rotation", "rhyme"], "does not serve rotation, rhyme"),
        ([torch.randn(3, dtype=torch.complex64)], [], "does not serve torch.complex64"),
        ([torch.randn(3, device="meta")], [], "serves cpu, not meta"),
        (
            [torch.randn(3), torch.randn(3).double()],
            [],
            "mixed arguments: torch.float32 on cpu, torch.float64",
        ),
        ([torch.randn(3, 3).to_sparse()], [], "serves strided tensors only"),
    ],
    ids=["option", "options", "dtype", "device", "mixed", "layout"],
)
def test_forced_backend_says_why_it_cannot(tensors: list[Tensor], options: list[str], reason: str) -> None:
    with llmkern.backend("native"), pytest.raises(dispatch.BackendError) as error:
        dispatch.pick("embedding", *tensors, options=options)
    assert str(error.value).startswith("embedding: backend 'native' was forced, but ")
    assert reason in str(error.value)
    assert str(error.value).endswith("; use backend('auto') to allow a fallback")
    assert dispatch.pick("embedding", *tensors, options=options) == "torch"


def test_forced_backend_without_a_kernel() -> None:
    for op, row in dispatch.TABLE.items():
        for name in set(dispatch.BACKENDS) - row.keys():
            missing = "no kernel for this op yet" if name in KERNEL_BACKENDS else f"{name} has no such op"
            with llmkern.backend(name), pytest.raises(dispatch.BackendError, match=missing):
                dispatch.pick(op, torch.randn(3))


def test_options_that_torch_or_the_reference_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    rotates_not = dispatch.Support(frozenset({"rotation"}), all_but=True)
    monkeypatch.setitem(dispatch.TABLE["embedding"], "torch", rotates_not)
    assert dispatch.pick("embedding", torch.randn(3), options=["rotation"]) == "reference"
    with llmkern.backend("torch"), pytest.raises(dispatch.BackendError, match="torch has no option rotation"):
        dispatch.pick("embedding", torch.randn(3), options=["rotation"])
    with (
        llmkern.backend("reference"),
        pytest.raises(dispatch.BackendError, match="reference has no option sparse"),
    ):
        dispatch.pick("embedding", torch.randn(3), options=["sparse"])


def test_size_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = dispatch.Support(unless=lambda work: "too small" if work.elements < 8 else None)
    monkeypatch.setitem(dispatch.TABLE["mse_loss"], "native", rule)
    monkeypatch.setitem(dispatch._unavailable, "native", None)
    assert dispatch.pick("mse_loss", torch.randn(3), elements=8) == "native"
    assert dispatch.pick("mse_loss", torch.randn(3), elements=7) == "torch"
    with llmkern.backend("native"):
        assert dispatch.pick("mse_loss", torch.randn(3), elements=7) == "native"


def test_backends_nest_and_end_with_their_block() -> None:
    def forced() -> str:
        return dispatch.pick("mse_loss", torch.randn(3))

    outside = forced()
    with llmkern.backend("reference"):
        assert forced() == "reference"
        with llmkern.backend("torch"):
            assert forced() == "torch"
            with llmkern.backend("auto"):
                assert forced() == outside
            assert forced() == "torch"
        assert forced() == "reference"
        with pytest.raises(KeyError), llmkern.backend("torch"):
            raise KeyError
        assert forced() == "reference"
    assert forced() == outside


@needs_native
def test_backward_follows_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: calls.append(name) or original(name))
    weight = torch.randn(5, 3, requires_grad=True)
    with llmkern.backend("native"):
        rows = LF.embedding(torch.tensor([1, 1, 4]), weight)
    assert calls == ["native"]
    with llmkern.backend("torch"):
        rows.sum().backward()
    assert calls == ["native", "native"]
    with llmkern.backend("torch"):
        rows = LF.embedding(torch.tensor([1, 1, 4]), weight)
    rows.sum().backward()
    assert calls == ["native", "native"]


def test_environment_variable() -> None:
    code = """
import torch, llmkern, llmkern.functional as F
print(llmkern.explain(F.mse_loss, torch.ones(3), torch.zeros(3)))
with llmkern.backend("auto"):
    print(llmkern.explain(F.mse_loss, torch.ones(3), torch.zeros(3)).backends[0])
"""

    def python(value: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LLMKERN_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    good = python("reference")
    assert good.returncode == 0, good.stderr
    unforced = dispatch.pick("mse_loss", torch.ones(3))
    assert good.stdout.splitlines() == ["mse_loss: reference (forced)", unforced]
    bad = python("cudnn")
    assert bad.returncode != 0
    assert "ValueError: LLMKERN_BACKEND: unknown backend 'cudnn'; expected one of auto, native" in bad.stderr


class Pair(torch.nn.Module):
    """A module of torch's around two of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(lnn.Embedding(5, 3), torch.nn.Linear(3, 2))
        self.loss = lnn.MSELoss()

    def forward(self, indices: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.inner(indices), target)


def test_explain_nested_modules() -> None:
    indices, target = torch.tensor([1, 4]), torch.randn(2, 2)
    explanation = llmkern.explain(Pair(), indices, target)
    assert [choice.op for choice in explanation.choices] == ["embedding", "mse_loss"]
    assert explanation.backends == tuple(choice.backend for choice in explanation.choices)
    with llmkern.backend("torch"):
        forced = llmkern.explain(Pair(), indices, target=target)
    assert str(forced) == "embedding: torch (forced)\nmse_loss: torch (forced)"
    assert str(llmkern.explain(torch.nn.Linear(3, 2), torch.randn(2, 3))) == "no llmkern op was called"


def test_explain_says_why_not() -> None:
    weight = torch.randn(5, 3)
    text = str(llmkern.explain(LF.embedding, torch.tensor([1]), weight.to(torch.complex64)))
    assert text.startswith("embedding: torch (first backend that serves this call)\n")
    if dispatch.unavailable("native") is None:
        assert "\n    not native: does not serve torch.complex64" in text


def test_explain_inside_explain_and_after_an_error() -> None:
    weight, indices = torch.randn(5, 3), torch.tensor([1])
    inside = []

    def function() -> None:
        LF.embedding(indices, weight)
        inside.append(llmkern.explain(LF.mse_loss, weight, weight))

    outer = llmkern.explain(function)
    assert [choice.op for choice in outer.choices] == ["embedding"]
    assert [choice.op for choice in inside[0].choices] == ["mse_loss"]
    with pytest.raises(IndexError):
        llmkern.explain(LF.embedding, torch.tensor([7]), weight)
    assert dispatch._trace is None


def test_compiled_functions_follow_a_force() -> None:
    """A float16 mean that torch lets overflow and the others do not tells who ran."""
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: LF.mse_loss(a, b), fullgraph=True, backend="aot_eager")
    a, b = torch.zeros(2, 100, dtype=torch.float16).unbind()
    a[0] = 300
    for name in ("torch", "reference", "torch"):
        with llmkern.backend(name):
            assert compiled(a, b) == (float("inf") if name == "torch" else 900)


def test_without_a_gpu_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._unavailable, "triton", "no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert llmkern.synchronize() is None
