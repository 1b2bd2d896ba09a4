"""Instruction sets: each keeps to its own namespace, all compute the same, one is chosen by name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import FLOATS

lnp = pytest.importorskip("llmkern.numpy")

from llmkern import _native  # noqa: E402

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lnp.__file__).parent
LIBRARIES = sorted([*PACKAGE.glob("_native*.so"), *PACKAGE.glob("_C_cpu*.so")])
# Not those of `make sanitize`: the sanitizers bring initialisers and shared functions.
OBJECTS = sorted(
    path
    for path in ROOT.glob("build/**/llmkern_isa_*.dir/csrc/core/isa/*.o")
    if ROOT / "build" / "sanitize" not in path.parents
)
ISAS = lnp.build_info()["isas"]

needs_binutils = pytest.mark.skipif(
    not (shutil.which("objdump") and shutil.which("nm")) or os.uname().machine != "x86_64",
    reason="needs binutils on x86-64",
)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LLMKERN_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_wide_registers_stay_in_their_namespace(library: Path) -> None:
    """zmm only in avx512's functions, ymm and VEX encodings only in avx2's and avx512's."""
    function, wrong, seen = "", set(), set()
    for line in run("objdump", "-d", "-C", "--no-show-raw-insn", str(library)).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
            continue
        # Most lines show no vector, at a glance.
        if not re.search(r"%[zyk]|:\s+v", line):
            continue
        text = re.sub(r"^\s+[0-9a-f]+:\s+|<.*>|#.*", "", line)
        for isa, pattern, owners in (
            ("avx512", r"%zmm|%k[1-7]\b", ("avx512",)),
            ("avx2", r"%ymm|^v[a-z]", ("avx2", "avx512")),
        ):
            if re.search(pattern, text):
                seen.add(isa)
                if not any(f"llmkern::cpu::{owner}::" in function for owner in owners):
                    wrong.add((function, text))
    assert seen == {"avx2", "avx512"} & set(ISAS), "the disassembly shows no vector code: is it stripped?"
    assert not wrong, sorted(wrong)[:10]


@needs_binutils
@pytest.mark.skipif(not OBJECTS, reason="no build folder")
@pytest.mark.parametrize("isa", ISAS)
def test_units_share_nothing(isa: str) -> None:
    """No static initialisers, which would run on any CPU; no function that the linker could share."""
    objects = [o for o in OBJECTS if f"llmkern_isa_{isa}.dir" in str(o)]
    assert objects
    for path in objects:
        assert ".init_array" not in run("objdump", "-h", str(path)), f"{path.name} has a static initialiser"
        for line in run("nm", "-C", "--defined-only", str(path)).splitlines():
            _, kind, name = line.split(" ", 2)
            shared = kind in "WVu" or kind.isupper()
            assert not shared or f"llmkern::cpu::{isa}::" in name, f"{path.name} defines {name} for everybody"


COMPUTE = """
import numpy as np, llmkern.numpy as lnp
from llmkern import _native
rng = np.random.default_rng(0)
results = {"isa": np.array(lnp.isa())}
for dtype in ("float32", "float64", "float16"):
    a, b = rng.standard_normal((70, 500)).astype(dtype), rng.standard_normal((500, 45)).astype(dtype)
    results["gemm " + dtype] = lnp.gemm(a, b)
    results["gemm transposed " + dtype] = lnp.gemm(np.asfortranarray(a), np.asfortranarray(b))
    indices = rng.integers(0, 9, 70)
    results["embedding " + dtype] = lnp.embedding_backward(a, indices, 9)
    x = rng.standard_normal(1003).astype(dtype) * 2
    for f in ("exp", "sigmoid", "tanh"):
        results[f + " " + dtype] = _native._elementwise(f, x)
    results["exp_negative " + dtype] = _native._elementwise("exp_negative", -abs(x))
np.savez(PATH, **results)
"""


LOSSES = """
import numpy as np, torch, llmkern.functional as F
import llmkern.numpy as lnp
torch.manual_seed(0)
results = {"isa": np.array(lnp.isa())}
target = torch.randint(301, (37,)).where(torch.rand(37) > 0.2, -100)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    x, w, b = (t.to(dtype).requires_grad_() for t in (torch.randn(37, 70), torch.randn(301, 70), torch.randn(301)))
    logits = torch.randn(37, 301).to(dtype).requires_grad_()
    for name, leaves, outputs in (
        ("cross_entropy", (logits,), F.cross_entropy(logits, target, outputs=("lse", "entropy"), softcap=5.0)),
        ("linear", (x, w, b), F.linear_cross_entropy(x, w, target, linear_bias=b, outputs=("lse", "entropy"))),
    ):
        total = outputs.loss + (outputs.lse * outputs.entropy).sum()
        for i, t in enumerate((*outputs[:3], *torch.autograd.grad(total, leaves))):
            results[f"{name} {i} {dtype}"] = t.detach().double().numpy()
np.savez(PATH, **results)
"""
# Of the dtype that a result was computed in, whatever it is kept in.
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10, "float64": 2.0**-52}


@pytest.mark.parametrize("compute", [COMPUTE, LOSSES], ids=["kernels", "losses"])
def test_all_sets_agree(compute: str, tmp_path: Path) -> None:
    results = {}
    for isa in ISAS:
        path = tmp_path / f"{isa}.npz"
        process = python(f"PATH = {str(path)!r}\n{compute}", isa)
        if process.returncode != 0:
            assert f"LLMKERN_CPU_ISA={isa}, but this CPU does not have it" in process.stderr, process.stderr
            continue
        results[isa] = dict(np.load(path))
        assert results[isa].pop("isa") == isa
    for isa, values in results.items():
        for name, value in values.items():
            expected = results["baseline"][name]
            bound = 40 * EPSILON[re.split(r"[ .]", name)[-1]] * np.abs(expected.astype(np.float64)).max()
            error = np.abs(value.astype(np.float64) - expected.astype(np.float64)).max()
            assert error <= bound, f"{name} on {isa}: {error:.2e} from baseline"


def test_an_unknown_set_is_refused() -> None:
    process = python("import llmkern.numpy as lnp; lnp.isa()", "sse9")
    assert process.returncode != 0
    assert "ValueError: LLMKERN_CPU_ISA=sse9; expected baseline, avx2 or avx512" in process.stderr


@pytest.mark.parametrize(
    ("name", "low", "high", "ulps"),
    [
        ("exp", -103.9, 88.7, 1.5),
        ("exp", -1.0, 1.0, 1.5),
        ("exp_negative", -87.0, 0.0, 5.0),
        ("exp_negative", -1.0, 0.0, 2.0),
        ("sigmoid", -87.0, 50.0, 6.0),
        ("sigmoid", -20.0, 20.0, 4.0),
        ("tanh", -10.0, 10.0, 2.0),
        ("tanh", -0.7, 0.7, 2.0),
        ("tanh", -1e-4, 1e-4, 1.5),
    ],
)
def test_functions_in_ulps(name: str, low: float, high: float, ulps: float) -> None:
    x = np.random.default_rng(0).uniform(low, high, 500_003).astype(np.float32)
    y = _native._elementwise(name, x).astype(np.float64)
    wide = x.astype(np.float64)
    expected = {"exp": np.exp, "exp_negative": np.exp, "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "tanh": np.tanh}[
        name
    ](wide)
    error = np.abs(y - expected) / np.spacing(np.abs(expected.astype(np.float32)))
    assert error.max() <= ulps, f"{error.max():.2f} ulp at {x[error.argmax()]!r}"


def test_functions_at_the_edges() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 88.73, -104.1, 1e-40, -1e-40], np.float32)
    for name, expected in {
        "exp": [1, 1, np.inf, 0, np.nan, np.inf, 0, 1, 1],
        "sigmoid": [0.5, 0.5, 1, 0, np.nan, 1, 0, 0.5, 0.5],
        "tanh": [0.0, -0.0, 1, -1, np.nan, 1, -1, 1e-40, -1e-40],
    }.items():
        got = _native._elementwise(name, x)
        np.testing.assert_array_equal(got, np.array(expected, np.float32), err_msg=name)
        if name == "tanh":
            assert np.signbit(got[1])
    below = np.array([0.0, -0.0, -np.inf, np.nan, -3e38], np.float32)
    np.testing.assert_array_equal(
        _native._elementwise("exp_negative", below), np.array([1, 1, 0, np.nan, 0], np.float32)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_conversion_round_trips(isa: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every 16-bit pattern survives load and store, whole vectors and every tail; NaN stays NaN."""
    if dtype.itemsize == 2:
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        x = torch.cat([torch.randn(1000, dtype=dtype), torch.tensor([0.0, -0.0, torch.inf], dtype=dtype)])
    bits = x.view(torch.uint16).numpy() if dtype == torch.bfloat16 else x.numpy()
    np.save(tmp_path / "x.npy", bits)
    code = f"""
import numpy as np, llmkern.numpy as lnp
from llmkern import _native
x = np.load({str(tmp_path / "x.npy")!r})
y = np.concatenate([_native._elementwise("copy", x[:n]) for n in (len(x), *range(33))])
np.save({str(tmp_path / "y.npy")!r}, y)
"""
    process = python(code, isa)
    if process.returncode != 0:
        assert "this CPU does not have it" in process.stderr, process.stderr
        pytest.skip(f"no {isa} here")
    got = np.load(tmp_path / "y.npy")
    want = np.concatenate([bits, *[bits[:n] for n in range(33)]])
    as_dtype = lambda array: torch.from_numpy(array).view(dtype)  # noqa: E731
    nan = as_dtype(want).isnan()
    assert torch.equal(as_dtype(got).isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(as_dtype(got).view(integer)[~nan], as_dtype(want).view(integer)[~nan])
