"""`_native`: what it says about the build and the machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llmkern
from llmkern import _facts, dispatch
from llmkern._openmp import load_native
from llmkern.ops import _library

lnp = pytest.importorskip("llmkern.numpy")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_build_info() -> None:
    info = lnp.build_info()
    assert info["version"] == llmkern.__version__
    assert info["isa"] == lnp.isa()
    assert info["isa"] in info["isas"]
    assert "baseline" in info["isas"]
    assert any(name in info["compiler"] for name in ("GNU", "Clang"))


def test_every_op_is_implemented_natively_and_nothing_else_is() -> None:
    """One schema each: Python defines it, the library implements it."""
    dispatch.load("native")
    names = {name for name in _library._schemas if "." not in name}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in names if not has(f"llmkern_cpu::{name}", "CPU")] == []
    assert [name for name in torch._C._dispatch_find_dangling_impls() if "llmkern" in name] == []


def test_both_languages_agree_about_facts() -> None:
    facts = load_native()._facts()
    assert facts["order"] == {mode: place for place, mode in enumerate(_facts.RNN_MODES)}
    assert facts["gates"] == _facts.GATES
    assert facts["cells"] == _facts.CELLS
    assert facts["saved_gates"] == _facts.SAVED_GATES
    assert facts["row_record"] == _facts.ROW_RECORD


@pytest.mark.usefixtures("threads")
def test_threads_are_torchs() -> None:
    for n in (1, 3):
        torch.set_num_threads(n)
        assert lnp.num_threads() == n
    lnp.set_num_threads(2)
    assert lnp.num_threads() == 2
    with pytest.raises(ValueError, match="got 0, expected 1 or more"):
        lnp.set_num_threads(0)


@pytest.mark.usefixtures("threads")
def test_peak_flops_agree_with_each_other() -> None:
    """fp64 has half the lanes of fp32, a bf16 dot product does two FMAs a lane; the machine is shared."""
    torch.set_num_threads(1)
    single, double = lnp.peak_flops("float32", 0.1), lnp.peak_flops("float64", 0.1)
    assert 1 < single < 2000
    assert 1.2 < single / double < 3.3
    if lnp.isa() == "avx512" and "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        assert 0.6 < lnp.peak_flops("bfloat16", 0.1) / single < 5
    else:
        with pytest.raises(ValueError, match="no bfloat16 dot product here"):
            lnp.peak_flops("bfloat16")


def test_peak_bandwidth() -> None:
    rates = {traffic: lnp.peak_bandwidth(traffic, 0.05) for traffic in ("read", "copy", "stream")}
    assert all(0.2 < rate < 5000 for rate in rates.values()), rates


def test_probes_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'; expected float32, float64"):
        lnp.peak_flops("int8")
    with pytest.raises(ValueError, match="no CPU arithmetic in float16"):
        lnp.peak_flops("float16")
    with pytest.raises(ValueError, match="unknown traffic 'write'; expected read, copy or stream"):
        lnp.peak_bandwidth("write")


def test_probes_release_the_gil() -> None:
    """Python goes on while a probe runs: a second thread counts many steps of it."""
    done = threading.Event()
    worker = threading.Thread(target=lambda: (lnp.peak_flops("float32", 0.3), done.set()))
    worker.start()
    steps = 0
    while not done.is_set():
        time.sleep(0.001)
        steps += 1
    worker.join()
    assert steps > 10
