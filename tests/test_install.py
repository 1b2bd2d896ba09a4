"""Installing as users do: a wheel under build isolation, without a compiler, without torch, from an sdist.

Every environment here is fresh and sees the packages of the running one through a path file. The path files of a folder
that is added so are not read: our own editable install stays out of sight.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout"),
]
NO_COMPILER = {"CXX": "/nonexistent/c++"}
WORK = """
import torch, llmkern, llmkern.nn as nn
torch.manual_seed(0)
words, targets = torch.randint(50, (4, 6)), torch.randint(50, (24,))
def losses(nn):
    torch.manual_seed(1)
    embedding, lstm, head = nn.Embedding(50, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 50)
    loss = nn.CrossEntropyLoss()(head(lstm(embedding(words))[0]).flatten(0, 1), targets)
    loss.backward()
    return loss.detach(), embedding.weight.grad
for ours, theirs in zip(losses(nn), losses(torch.nn)):
    torch.testing.assert_close(ours, theirs)
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLMKERN_", "PYTHON"))}
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, env=kept | environment, cwd=Path(arguments[0]).anchor, capture_output=True, text=True
    )


def must(*command: object, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold, so that a build leaves nothing in the checkout."""
    to = tmp_path_factory.mktemp("source") / "llmkern"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CMake builds: a second build compiles only what differs."""
    return tmp_path_factory.mktemp("cmake")


def build_wheel(source: Path, to: Path, *options: str, **environment: str) -> tuple[Path, str]:
    said = must(sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", *options, "-w", to, source, **environment)
    (wheel,) = to.glob("*.whl")
    return wheel, said


@pytest.fixture(scope="session")
def wheel(source: Path, build_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel, and what pip said while it was built."""
    where = {"LLMKERN_BUILD": "require", "LLMKERN_BUILD_DIR": str(build_folder)}
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), **where)


def environment(folder: Path, wheel: Path, *, sees_torch: bool = True) -> Path:
    """The interpreter of a fresh environment with the wheel in it."""
    must(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    must(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    if sees_torch:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = must(python, "-c", "import llmkern; print(llmkern.__file__)")
    assert home.startswith(str(folder)), home
    return python


def test_the_wheel_holds_what_it_should(wheel: tuple[Path, str]) -> None:
    path, said = wheel
    assert "Collecting torch" not in said
    assert "Downloading torch" not in said
    names = zipfile.ZipFile(path).namelist()
    libraries = sorted(Path(name).name.split(".")[0] for name in names if ".so" in name)
    assert libraries == ["_C_cpu", "_native"]
    for name in ("py.typed", "_build_info.json", "nn/rnn.py", "kernels/__init__.py", "benchmarks/suite.py"):
        assert f"llmkern/{name}" in names
    assert not [name for name in names if not name.startswith("llmkern")], "nothing else at the top level"
    assert not [name for name in names if name.startswith("llmkern/tests")]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_op_library_needs_no_particular_place(wheel: tuple[Path, str], tmp_path: Path) -> None:
    zipfile.ZipFile(wheel[0]).extract("llmkern/_C_cpu.so", tmp_path)
    dynamic = must(shutil.which("readelf"), "-d", tmp_path / "llmkern" / "_C_cpu.so")
    assert "libtorch_cpu.so" in dynamic
    for unwanted in ("RPATH", "RUNPATH", "libgomp", "libpython"):
        assert unwanted not in dynamic, unwanted


def test_an_installed_wheel_works(wheel: tuple[Path, str], tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel[0])
    must(python, "-c", WORK)
    must(
        python,
        "-c",
        "import torch, llmkern, llmkern.functional as F\n"
        "with llmkern.backend('native'):\n"
        "    x = torch.randn(5, 3)\n"
        "    assert torch.equal(F.embedding(torch.tensor([4, 0]), x), x[[4, 0]])",
    )
    must(python, "-c", "import llmkern.numpy, sys; llmkern.numpy.isa(); assert 'torch' not in sys.modules")
    facts = json.loads(must(python, "-m", "llmkern", "info", "--json"))
    assert facts["backends"]["native"] is None
    assert facts["not_built"] == {}


def test_without_a_compiler_everything_runs_on_torch(source: Path, tmp_path: Path) -> None:
    path, _ = build_wheel(source, tmp_path, **NO_COMPILER)
    assert not [name for name in zipfile.ZipFile(path).namelist() if ".so" in name]
    python = environment(tmp_path / "env", path)
    must(python, "-c", WORK)
    facts = json.loads(must(python, "-m", "llmkern", "info", "--json"))
    for reason in (facts["backends"]["native"], *facts["not_built"].values()):
        assert "C++20 compiler" in reason
        assert "apt-get install g++" in reason
    assert "apt-get install" in must(python, "-m", "llmkern", "info", COLUMNS="400")
    done = run(python, "-c", "import llmkern.numpy; llmkern.numpy.isa()")
    assert "llmkern info" in done.stderr
    assert done.returncode == 1


def test_require_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source)
    done = run(*command, LLMKERN_BUILD="require", **NO_COMPILER)
    assert done.returncode != 0
    assert "LLMKERN_BUILD=require, but not built" in done.stdout + done.stderr
    assert "/nonexistent/c++" in done.stdout + done.stderr
    done = run(*command, LLMKERN_BUILD="perhaps")
    assert done.returncode != 0
    assert "LLMKERN_BUILD: got 'perhaps', expected auto, require or off" in done.stdout + done.stderr


def test_off_builds_nothing(source: Path, tmp_path: Path) -> None:
    path, _ = build_wheel(source, tmp_path, LLMKERN_BUILD="off")
    python = environment(tmp_path / "env", path)
    must(python, "-c", WORK)
    facts = json.loads(must(python, "-m", "llmkern", "info", "--json"))
    assert set(facts["not_built"].values()) == {"LLMKERN_BUILD=off"}


def test_without_torch_the_numpy_module_is_built(source: Path, build_folder: Path, tmp_path: Path) -> None:
    must(sys.executable, "-m", "venv", tmp_path / "bare")
    bare = tmp_path / "bare" / "bin" / "python"
    command = (bare, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source)
    must(*command, LLMKERN_BUILD_DIR=str(build_folder))
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        facts = json.loads(archive.read("llmkern/_build_info.json"))
    assert [name for name in names if "_native" in name]
    assert "llmkern/_C_cpu.so" not in names
    assert "pip install 'torch>=2.10'" in facts["missing"]["_C_cpu"]


def test_the_sdist_is_complete(source: Path, tmp_path: Path) -> None:
    must(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, source)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "kernels", "llmkern", "benchmarks", "tests", "docs", "examples")
    wanted = {
        str(p.relative_to(source))
        for f in folders
        for p in (source / f).rglob("*")
        if p.suffix in (".py", ".cpp", ".h", ".md")
    }
    assert wanted - names == set()
    assert {"Makefile", "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]
    wheel, _ = build_wheel(path, tmp_path / "wheel", LLMKERN_BUILD="off")
    assert "llmkern/benchmarks/suite.py" in zipfile.ZipFile(wheel).namelist()
