"""Builds the native libraries by calling CMake, and nothing else.

``LLMKERN_BUILD`` says how much the build may give up:

``auto``     (default) builds what the machine can build; what was skipped, and why, is written to
             ``llmkern/_build_info.json``, which ``python -m llmkern info`` reads
``require``  fails if anything is missing
``off``      builds nothing: Triton and reference paths only
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("LLMKERN_BUILD", "auto")
if MODE not in ("auto", "require", "off"):
    sys.exit(f"LLMKERN_BUILD is {MODE!r}; expected auto, require or off")


def find_torch_include() -> Path | None:
    """The headers of the torch that the package will run with.

    A build-isolation environment has no torch of its own, but runs on the interpreter it builds for, so that
    ``purelib`` is still the user's site-packages.
    """
    for key in ("purelib", "platlib"):
        include = Path(sysconfig.get_paths()[key]) / "torch" / "include"
        if (include / "torch" / "csrc" / "stable" / "library.h").exists():
            return include
    return None


class CMakeBuild(build_ext):
    """One CMake build for all extensions; ``optional`` ones may be missing afterwards."""

    def run(self) -> None:
        package = ROOT / "llmkern" if self.inplace else Path(self.build_lib).resolve() / "llmkern"
        package.mkdir(parents=True, exist_ok=True)
        missing: dict[str, str] = {}
        include = find_torch_include()
        if MODE == "off":
            missing = {"_native": "LLMKERN_BUILD=off", "_C_cpu": "LLMKERN_BUILD=off"}
        else:
            if include is None:
                missing["_C_cpu"] = "no torch headers in this environment; install torch >= 2.10, then llmkern again"
            try:
                self.cmake(package, include)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = self.why(error)
                missing = {"_native": reason, "_C_cpu": reason}
        if missing and MODE == "require":
            sys.exit("LLMKERN_BUILD=require, but not built: " + "; ".join(f"{k}: {v}" for k, v in missing.items()))
        for name, reason in missing.items():
            print(f"llmkern: {name} was not built: {reason}", file=sys.stderr)
        info = {"mode": MODE, "missing": missing, "torch_include": str(include) if include else None}
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def cmake(self, package: Path, include: Path | None) -> None:
        build = Path(os.environ.get("LLMKERN_BUILD_DIR", Path(self.build_temp).resolve() / "cmake"))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLLMKERN_TORCH_INCLUDE={include or ''}",
        ]  # fmt: skip
        if ninja := shutil.which("ninja"):
            # Named, because a cache from an earlier isolated build names a ninja that is gone.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            import pybind11

            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        except ImportError:
            pass
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)

    @staticmethod
    def why(error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "cmake was not found; pip install cmake"
        if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            return "no C++ compiler was found; install g++ or clang++ (Debian: apt-get install g++)"
        return f"the CMake build failed ({error}); run `pip install -v .` to see its output"

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[] if MODE == "off" else [Extension("llmkern._native", sources=[], optional=MODE != "require")],
    cmdclass={"build_ext": CMakeBuild},
)
