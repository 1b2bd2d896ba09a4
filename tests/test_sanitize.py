"""The C++ core under the address and the undefined-behaviour sanitizer: `make sanitize`, where it can be built."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "tests" / "sanitize").exists(), reason="not in a checkout"),
]


def lacking(scratch: Path) -> str | None:
    """What this machine needs and has not."""
    for tool in ("make", "cmake"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    source, program = scratch / "nothing.cpp", scratch / "nothing"
    source.write_text("int main() {}\n")
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-fopenmp", "-fsanitize=address,undefined"]
    try:
        built = subprocess.run([*compiler, str(source), "-o", str(program)], capture_output=True, text=True)
    except OSError as error:
        return f"no compiler: {error}"
    if built.returncode != 0:
        return f"no compiler with the sanitizers and OpenMP: {built.stderr[-300:]}"
    ran = subprocess.run(
        [program], capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    )
    return f"the sanitizers do not run here: {ran.stderr[-300:]}" if ran.returncode != 0 else None


def test_core_is_clean(tmp_path: Path) -> None:
    if (reason := lacking(tmp_path)) is not None:
        pytest.skip(reason)
    # What `make test` would hand down to its children is not meant for this make.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLMKERN_", "MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "sanitize", "ARGS="], cwd=ROOT, env=kept, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    # Some units are checked with what they are parts of.
    parts = {"elementwise": "runtime", "probe": "runtime", "rnn_norm": "rnn", "table_gradient": "embedding"}
    ops = {parts.get(path.stem, path.stem) for path in (ROOT / "csrc" / "core" / "isa").glob("*.cpp")}
    for isa in ("baseline", "avx2", "avx512"):
        if f"LLMKERN_CPU_ISA={isa}, but this CPU does not have it" in output:
            continue
        said = re.split("sanitize: (?:baseline|avx2|avx512)\n", output.partition(f"sanitize: {isa}\n")[2])[0]
        for op in ops:
            assert f"sanitize: {op} passed\n" in said, f"{op} on {isa}"
