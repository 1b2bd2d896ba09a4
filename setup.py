"""Builds the native libraries by calling CMake, and nothing else.

``LLMKERN_BUILD`` says how much the build may give up:

``auto``     (default) builds what the machine can build; what was skipped, and why, is written to
             ``llmkern/_build_info.json``, which ``python -m llmkern info`` reads
``require``  fails if anything is missing
``off``      builds nothing: Triton and reference paths only

``LLMKERN_BUILD_DIR`` names a folder that keeps what was compiled: a later build, from whatever copy of the sources,
compiles only what differs.
"""

import filecmp
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("LLMKERN_BUILD", "auto")
if MODE not in ("auto", "require", "off"):
    sys.exit(f"LLMKERN_BUILD: got {MODE!r}, expected auto, require or off; set it to one of these, or unset it")

GET_TORCH = (
    "no torch >= 2.10 in the environment that llmkern was built in; pip install 'torch>=2.10', then install llmkern"
    " again (torch outside this environment: with pip's --no-build-isolation, or as `python -m build --no-isolation`)"
)
GET_COMPILER = (
    "llmkern needs a C++20 compiler and Python's headers: install them (Debian, Ubuntu: apt-get install g++"
    " python3-dev; Fedora: dnf install gcc-c++ python3-devel; macOS: xcode-select --install; conda: conda install"
    " cxx-compiler), then install llmkern again; `pip install -v .` shows the whole build"
)
# CMake's and a compiler's complaint: a line, and the indented ones below it.
COMPLAINT = re.compile(r"^.*(?:CMake Error|error:).*(?:\n(?:[ \t].*)?)*", re.MULTILINE)


class BuildError(Exception):
    """Why CMake gave up, and what to do."""


def find_torch_include() -> Path | None:
    """The headers of the torch that the package will run with.

    A build-isolation environment has no torch of its own, but runs on the interpreter it builds for, so that
    ``purelib`` is still the user's site-packages.
    """
    seen = importlib.util.find_spec("torch")
    folders = [*((seen and seen.submodule_search_locations) or ())]
    folders += [os.path.join(sysconfig.get_path(key), "torch") for key in ("purelib", "platlib")]
    for folder in folders:
        # The header came with 2.10, as did what the bindings use.
        if Path(folder, "include", "torch", "csrc", "stable", "version.h").exists():
            # The same place by whatever link it was found: objects are known by it.
            return Path(folder, "include").resolve()
    return None


def stage(folder: Path) -> Path:
    """Copies what is compiled into ``folder``, where it differs, and returns where.

    Compilers and ninja know a file by its path and its age; pip and build unpack sources anew each time.
    """
    names = {"CMakeLists.txt", "pyproject.toml"}
    names |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for path in [*folder.rglob("*")]:
        if path.is_file() and str(path.relative_to(folder)) not in names:
            path.unlink()
    for name in names:
        if not (folder / name).exists() or not filecmp.cmp(ROOT / name, folder / name, shallow=False):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def cmake(source: Path, *arguments: str) -> None:
    """Runs CMake and passes its output on; what it says of ``source`` is said of the files that were staged."""
    try:
        process = subprocess.Popen(
            ["cmake", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise BuildError("cmake was not found; pip install cmake, then install llmkern again") from None
    output = ""
    for line in process.stdout or ():
        line = line.replace(str(source), str(ROOT))
        print(line, end="", flush=True)
        output += line
    if process.wait():
        complaint = COMPLAINT.search(output)
        what = textwrap.shorten(complaint[0] if complaint else output[-300:], 300, placeholder=" ...")
        raise BuildError(f"the CMake build failed ({what}); {GET_COMPILER}")


class CMakeBuild(build_ext):
    """One CMake build for all libraries; they may be missing afterwards, unless required."""

    def run(self) -> None:
        package = ROOT / "llmkern" if self.inplace else Path(self.build_lib).resolve() / "llmkern"
        package.mkdir(parents=True, exist_ok=True)
        # An earlier build's libraries would pass for this one's.
        for library in package.glob("*.so"):
            library.unlink()
        missing: dict[str, str] = {}
        if MODE == "off":
            missing = dict.fromkeys(("_native", "_C_cpu"), "LLMKERN_BUILD=off")
        else:
            include = find_torch_include()
            if include is None:
                missing["_C_cpu"] = GET_TORCH
            try:
                # Nothing is compiled for a build that has failed already.
                if not (missing and MODE == "require"):
                    self.build(package, include)
            except (OSError, BuildError) as error:
                missing = dict.fromkeys(("_native", "_C_cpu"), str(error))
        if missing and MODE == "require":
            sys.exit("LLMKERN_BUILD=require, but not built: " + "; ".join(f"{k}: {v}" for k, v in missing.items()))
        for name, reason in missing.items():
            print(f"llmkern: {name} was not built: {reason}", file=sys.stderr)
        (package / "_build_info.json").write_text(json.dumps({"mode": MODE, "missing": missing}, indent=2) + "\n")

    def build(self, package: Path, include: Path | None) -> None:
        kept = os.environ.get("LLMKERN_BUILD_DIR")
        build = Path(kept or Path(self.build_temp) / "cmake").resolve()
        source = stage(build / "source") if kept else ROOT
        build.mkdir(parents=True, exist_ok=True)
        # Each build looks for compiler and tools anew: an earlier one's may be too old, or gone. Objects stay.
        for found in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")):
            found.unlink(missing_ok=True)
        configure = [
            "-S", str(source), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLLMKERN_TORCH_INCLUDE={include or ''}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        try:
            import pybind11

            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        except ImportError:
            pass
        for arguments in (
            configure,
            ("--build", str(build), "--parallel"),
            ("--install", str(build), "--prefix", str(package)),
        ):
            cmake(source, *arguments)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# Without its compiled parts too: a wheel says which Python it was built for, whatever the machine could build.
setup(ext_modules=[Extension("llmkern._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
