"""Installing as users do: `make wheel`, pip from a clone, in place, from an sdist; without a compiler, without torch.

What is compiled is kept in one folder, `make`'s own if `make test` runs this, so that no test compiles it again. Every
environment here is fresh and sees the packages of the running one through a path file: torch is not installed
again. Path files of a folder added that way are not read, so that our own editable install stays out of sight.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout"),
]
MAKE = shutil.which("make")
NO_COMPILER = {"CXX": "/nonexistent/c++"}
OFFLINE = re.compile(r"requirement\s+(setuptools|cmake|ninja|pybind11)\S*\s+\(from\s+versions:\s+none\)")
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
    ours = ("LLMKERN_", "PYTHON", "MAKE", "MFLAGS", "PYTEST_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    # Objects are known by their flags, and this is one.
    kept["LLMKERN_WERROR"] = os.environ.get("LLMKERN_WERROR", "")
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, env=kept | environment, cwd=Path(arguments[0]).anchor, capture_output=True, text=True
    )
    if done.returncode != 0 and OFFLINE.search(done.stdout + done.stderr):
        pytest.skip("pip reaches no package index, and a build under isolation needs one")
    return done


def must(*command: object, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold: a build leaves nothing in the checkout. One folder, so that builds meet older ones."""
    to = tmp_path_factory.mktemp("source") / "llmkern"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    # As if an older build had left them.
    for name in ("_C_cpu.so", "_build_info.json"):
        (to / "llmkern" / name).write_text("{}")
    return to


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CMake builds: a second build compiles only what differs."""
    return Path(os.environ.get("LLMKERN_BUILD_DIR") or tmp_path_factory.mktemp("cmake"))


def bare(folder: Path) -> tuple[Path, Path]:
    """A fresh environment, with nothing in it: its interpreter, and where its packages go."""
    must(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin" / "python", site


@pytest.fixture(scope="session")
def made(source: Path, build_folder: Path) -> tuple[Path, Path, str]:
    """`make wheel` in a clone: the wheel, the sdist, and what it said."""
    _, site = bare(source / ".venv")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    version = torch.__version__.partition("+")[0]
    # The tools of this environment: another CMake would compile everything again.
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = must(MAKE, "-C", source, "wheel", f"TORCH={version}", LLMKERN_BUILD_DIR=str(build_folder), PATH=tools)
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return wheel, sdist, said


def build_wheel(source: Path, to: Path, *options: str, **environment: str) -> tuple[Path, str]:
    said = must(sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", *options, "-w", to, source, **environment)
    (wheel,) = to.glob("*.whl")
    return wheel, said


def environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a fresh environment with the wheel in it."""
    python, site = bare(folder)
    must(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = must(python, "-c", "import llmkern; print(llmkern.__file__)")
    assert home.startswith(str(folder)), home
    return python


def built(wheel: Path) -> tuple[list[str], dict[str, str]]:
    """The libraries in a wheel, and why others are not."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = sorted(Path(name).name.split(".")[0] for name in archive.namelist() if ".so" in name)
        return libraries, json.loads(archive.read("llmkern/_build_info.json"))["missing"]


def test_the_wheel_holds_what_it_should(source: Path, made: tuple[Path, Path, str]) -> None:
    path, _, said = made
    assert "Collecting torch" not in said
    assert "Downloading torch" not in said
    assert built(path) == (["_C_cpu", "_native"], {})
    names = zipfile.ZipFile(path).namelist()
    modules = [f"llmkern/{p.relative_to(source)}" for f in ("kernels", "benchmarks") for p in source.glob(f"{f}/*.py")]
    modules += [str(p.relative_to(source)) for p in source.glob("llmkern/**/*.py")]
    assert {*modules, "llmkern/py.typed"} - {*names} == set(), "a package that pyproject.toml does not list"
    assert not [name for name in names if not name.startswith("llmkern")], "nothing else at the top level"
    assert not [name for name in names if name.startswith("llmkern/tests")]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_op_library_needs_no_particular_place(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    zipfile.ZipFile(made[0]).extract("llmkern/_C_cpu.so", tmp_path)
    dynamic = must(shutil.which("readelf"), "-d", tmp_path / "llmkern" / "_C_cpu.so")
    assert "libtorch_cpu.so" in dynamic
    for unwanted in ("RPATH", "RUNPATH", "libgomp", "libpython"):
        assert unwanted not in dynamic, unwanted


def test_a_wheel_needs_torch_before_it_compiles(source: Path, tmp_path: Path) -> None:
    """What `python -m build` says in an environment of its own: at once, and how to do it."""
    python, _ = bare(tmp_path / "bare")
    command = (sys.executable, "-m", "pip", "--python", python, "wheel", "--no-deps", "-v", "-w", tmp_path, source)
    done = run(*command, LLMKERN_BUILD="require")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "pip install 'torch>=2.10'" in said
    assert "python -m build --no-isolation" in said
    assert "Building CXX object" not in said


def test_an_installed_wheel_works(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    python = environment(tmp_path / "env", made[0])
    # As on a machine without a compiler.
    must(python, "-c", WORK, LLMKERN_BACKEND="native", PATH="/nonexistent", **NO_COMPILER)
    must(python, "-c", "import llmkern.numpy, sys; llmkern.numpy.isa(); assert 'torch' not in sys.modules")
    facts = json.loads(must(python, "-m", "llmkern", "info", "--json"))
    assert facts["backends"]["native"] is None
    assert facts["not_built"] == {}


def test_without_a_compiler_everything_runs_on_torch(source: Path, tmp_path: Path) -> None:
    path, _ = build_wheel(source, tmp_path, **NO_COMPILER)
    assert built(path)[0] == []
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


@pytest.mark.parametrize("compiler", ["none", "old"])
def test_a_failed_build_says_why(compiler: str, source: Path, tmp_path: Path) -> None:
    if compiler == "none":
        # CMake looks for compilers in the system's folders too, whatever PATH says.
        toolchain = tmp_path / "toolchain.cmake"
        toolchain.write_text("set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH FALSE)\n")
        variables = {"CXX": "", "PATH": "/nonexistent", "CMAKE_TOOLCHAIN_FILE": str(toolchain)}
        expected = "No CMAKE_CXX_COMPILER could be found"
    else:
        old = tmp_path / "old-c++"
        old.write_text(
            f"#!/bin/sh\nfor a; do case $a in -std=*2?) echo \"error: unknown option '$a'\" >&2; exit 1;; esac; done\n"
            f'exec {os.environ.get("CXX", "c++")} "$@"\n'
        )
        old.chmod(0o755)
        variables, expected = {"CXX": str(old)}, "error: unknown option '-std="
    libraries, missing = built(build_wheel(source, tmp_path, **variables)[0])
    assert libraries == []
    assert missing.keys() == {"_native", "_C_cpu"}
    for reason in missing.values():
        assert expected in reason
        assert "apt-get install g++" in reason


def test_require_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source)
    done = run(*command, LLMKERN_BUILD="require", **NO_COMPILER)
    assert done.returncode != 0
    assert "LLMKERN_BUILD=require, but not built" in done.stdout + done.stderr
    assert "/nonexistent/c++" in done.stdout + done.stderr
    done = run(*command, LLMKERN_BUILD="perhaps")
    assert done.returncode != 0
    assert "LLMKERN_BUILD: got 'perhaps', expected auto, require or off" in done.stdout + done.stderr


def test_without_torch_the_numpy_module_is_built(source: Path, build_folder: Path, tmp_path: Path) -> None:
    python, _ = bare(tmp_path / "bare")
    command = (sys.executable, "-m", "pip", "--python", python, "wheel", "--no-deps", "-w", tmp_path, source)
    must(*command, LLMKERN_BUILD_DIR=str(build_folder))
    (path,) = tmp_path.glob("*.whl")
    libraries, missing = built(path)
    assert libraries == ["_native"]
    assert missing.keys() == {"_C_cpu"}
    assert "pip install 'torch>=2.10'" in missing["_C_cpu"]
    must(environment(tmp_path / "env", path), "-c", "import llmkern.numpy; llmkern.numpy.isa()")


@pytest.mark.parametrize("what", ["editable", "tree", "sdist"])
def test_pip_installs(
    what: str, source: Path, made: tuple[Path, Path, str], build_folder: Path, tmp_path: Path
) -> None:
    """Under build isolation, next to the torch that is there."""
    python, site = bare(tmp_path / "env")
    # Where the build looks for torch; a path file is unseen under isolation.
    (site / "torch").symlink_to(Path(torch.__file__).parent)
    target = {"editable": ("-e", source), "tree": (source,), "sdist": (made[1],)}[what]
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *target)
    must(*command, LLMKERN_BUILD="require", LLMKERN_BUILD_DIR=str(build_folder))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    must(python, "-c", WORK, LLMKERN_BACKEND="native")
    home = source if what == "editable" else site
    must(python, "-c", f"import llmkern.kernels as k; assert k.__file__.startswith({str(home)!r}), k.__file__")


@pytest.mark.skipif(MAKE is None, reason="no make")
def test_clean_removes_what_the_other_targets_made(tmp_path: Path) -> None:
    kept = {"csrc/core/a.cpp", "llmkern/a.py", "Makefile"}
    made = {".venv/a", ".venv-peers/a", "build/native/a", "dist/a.whl", "llmkern.egg-info/a"}
    made |= {"llmkern/_C_cpu.so", "llmkern/_native.cpython-311-x86_64-linux-gnu.so", "llmkern/_build_info.json"}
    for name in kept | made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    must(MAKE, "-C", tmp_path, "clean")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_the_sdist_is_complete(source: Path, made: tuple[Path, Path, str]) -> None:
    with tarfile.open(made[1]) as archive:
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


def test_off_builds_nothing_and_an_sdist_builds_a_wheel(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, _ = build_wheel(made[1], tmp_path, LLMKERN_BUILD="off")
    assert built(path)[0] == []
    from_sdist, from_tree = ({n for n in zipfile.ZipFile(p).namelist() if ".so" not in n} for p in (path, made[0]))
    assert from_sdist == from_tree
    python = environment(tmp_path / "env", path)
    must(python, "-c", WORK)
    facts = json.loads(must(python, "-m", "llmkern", "info", "--json"))
    assert set(facts["not_built"].values()) == {"LLMKERN_BUILD=off"}
