"""Builds the native libraries by calling CMake, and nothing else.

``LLMKERN_BUILD`` says how much the build may give up:

``auto``     (default) builds what the machine can build; what was skipped, and why, is written to
             ``llmkern/_build_info.json``, which ``python -m llmkern info`` reads
``require``  fails if anything is missing
``off``      builds nothing: Triton and reference paths only
"""

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
    " again (torch outside this environment: with --no-build-isolation)"
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
            return Path(folder, "include")
    return None


def cmake(*arguments: str) -> None:
    """Runs CMake and passes its output on."""
    try:
        process = subprocess.Popen(
            ["cmake", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise BuildError("cmake was not found; pip install cmake, then install llmkern again") from None
    output = ""
    for line in process.stdout or ():
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
                self.build(package, include)
            except (OSError, BuildError) as error:
                missing = dict.fromkeys(("_native", "_C_cpu"), str(error))
        if missing and MODE == "require":
            sys.exit("LLMKERN_BUILD=require, but not built: " + "; ".join(f"{k}: {v}" for k, v in missing.items()))
        for name, reason in missing.items():
            print(f"llmkern: {name} was not built: {reason}", file=sys.stderr)
        (package / "_build_info.json").write_text(json.dumps({"mode": MODE, "missing": missing}, indent=2) + "\n")

    def build(self, package: Path, include: Path | None) -> None:
        build = Path(os.environ.get("LLMKERN_BUILD_DIR", Path(self.build_temp).resolve() / "cmake"))
        build.mkdir(parents=True, exist_ok=True)
        # Each build looks for compiler and tools anew: an earlier one's may be too old, or gone. Objects stay.
        for found in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")):
            found.unlink(missing_ok=True)
        configure = [
            "-S", str(ROOT), "-B", str(build),
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
        cmake(*configure)
        cmake("--build", str(build), "--parallel")
        cmake("--install", str(build), "--prefix", str(package))

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# Without its compiled parts too: a wheel says which Python it was built for, whatever the machine could build.
setup(ext_modules=[Extension("llmkern._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
