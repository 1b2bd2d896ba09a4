"""The house rules that code can check: import directions, one stem per op, file lengths, documented commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmkern"

# nn -> functional -> ops -> dispatch -> {kernels, native, reference}. A layer may use what it names; what
# is not named here (the command line, the root) stands above all: none of them imports it.
MAY_IMPORT = {
    "nn": {"functional", "dispatch", "reference", "_signature", "_torch_tree", "_when_loaded"},
    "functional": {"ops", "dispatch", "reference", "_facts", "_torch"},
    "optim": {"functional", "ops", "dispatch", "reference", "_facts", "_signature", "_torch_tree"},
    "ops": {"dispatch", "reference", "_facts", "_groups", "_torch", "_graphs", "_when_loaded"},
    "dispatch": {"_graphs", "_plain", "_support"},
    "_facts": set(),
    "_graphs": set(),
    "_groups": set(),
    "_plain": {"_graphs"},
    "_signature": set(),
    "_support": {"_plain"},
    "_torch": set(),
    "_torch_tree": set(),
    "_when_loaded": set(),
    "native": set(),
    "kernels": {"_facts", "_groups"},
    "reference": {"_facts", "_groups", "_torch"},
    "numpy": {"_openmp", "_native"},
    "_openmp": {"_native"},
}
# Backends that dispatch loads by name, as strings.
LOADED = {"dispatch": {"native", "kernels", "reference"}}

SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_of(path: Path) -> tuple[str, ...]:
    """The dotted name, in parts; kernels/ is installed as llmkern.kernels."""
    parts = (
        "llmkern",
        *path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts,
    )
    return parts[:-1] if parts[-1] == "__init__" else parts


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def is_submodule(parts: tuple[str, ...]) -> bool:
    if parts == ("llmkern", "_native"):
        return True
    homes = (PACKAGE.joinpath(*parts[1:]), ROOT.joinpath(*parts[1:]) if parts[1:2] == ("kernels",) else None)
    return any(h is not None and (h.is_dir() or h.with_suffix(".py").exists()) for h in homes)


def imports(path: Path, source: str) -> Iterator[tuple[str, ...]]:
    """Every module of llmkern that the file imports, in parts, relative imports resolved."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            children = [(*base, alias.name) for alias in node.names]
            found = [c if base[:1] == ("llmkern",) and is_submodule(c) else base for c in children]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found = [tuple(str(node.args[0].value).split("."))]
        else:
            continue
        yield from (f for f in found if f[:1] in (("llmkern",), ("kernels",)))


def violations(path: Path, source: str) -> list[str]:
    layer = module_of(path)[1] if len(module_of(path)) > 1 else ""
    if layer not in MAY_IMPORT:
        return []
    allowed = MAY_IMPORT[layer] | {layer}
    wrong = []
    for target in imports(path, source):
        if target[0] == "kernels":
            wrong.append("kernels is installed as llmkern.kernels")
        elif len(target) == 1 or target[1] not in allowed:
            wrong.append(f"{layer} imports {'.'.join(target)}; it may import {', '.join(sorted(allowed))}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/x.py", "from ..functional import embedding"),
        ("ops/x.py", "from .. import nn"),
        ("ops/x.py", "import llmkern.functional.embedding"),
        ("functional/__init__.py", "from .. import nn"),
        ("dispatch.py", "from . import ops"),
        ("dispatch.py", "def f():\n    from .ops import x"),
        ("reference/x.py", "import importlib\nimportlib.import_module('llmkern.ops')"),
        ("reference/x.py", "import llmkern"),
        ("nn/x.py", "from ..ops._autograd import KernelFunction"),
        ("nn/x.py", "import kernels"),
        ("../kernels/x.py", "from llmkern import dispatch"),
        ("../kernels/x.py", "from ..reference import embedding"),
    ],
)
def test_a_wrong_import_is_seen(file: str, source: str) -> None:
    path = PACKAGE / file if not file.startswith("../") else ROOT / file[3:]
    assert violations(path, source)


def test_dispatch_knows_the_backends_by_name_only() -> None:
    source = (PACKAGE / "dispatch.py").read_text()
    for backend in LOADED["dispatch"]:
        assert f'"llmkern.{backend}"' in source


def stems() -> list[str]:
    files = (PACKAGE / "ops").glob("*.py")
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def test_every_stem_has_its_files() -> None:
    """Who knows the op knows every path."""
    missing = []
    for stem in stems():
        wanted = [PACKAGE / "reference" / f"{stem}.py", ROOT / "tests" / f"test_{stem}.py"]
        home = "optim" if stem.endswith("optim") else "functional"
        if home == "functional":
            wanted.append(PACKAGE / home / f"{stem}.py")
        if (ROOT / "csrc" / "torch" / f"{stem}.cpp").exists():
            wanted += [ROOT / "csrc" / "core" / f"{stem}{suffix}" for suffix in (".h", ".cpp")]
            wanted.append(ROOT / "tests" / "sanitize" / f"{stem}.cpp")
        missing += [str(path.relative_to(ROOT)) for path in wanted if not path.exists()]
    assert not missing, missing


def test_native_files_have_no_strange_stems() -> None:
    """What is in csrc/torch and kernels/ belongs to an op; a unit in core/isa to a header in core."""
    known = set(stems())
    for folder, pattern in ((ROOT / "csrc" / "torch", "*.cpp"), (ROOT / "kernels", "*.py")):
        for path in folder.glob(pattern):
            assert path.stem.startswith("_") or path.stem in known, f"{path.name}: no op of this stem"
    for path in (ROOT / "csrc" / "core" / "isa").glob("*.cpp"):
        assert (path.parents[1] / f"{path.stem}.h").exists(), f"core/isa/{path.name} has no core/{path.stem}.h"


def test_core_is_free_of_torch_and_python() -> None:
    for path in (ROOT / "csrc" / "core").rglob("*"):
        if path.suffix in (".h", ".cpp"):
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not [i for i in includes if "torch" in i or "pybind" in i or "Python.h" in i], path.name


def test_files_are_short() -> None:
    """About 400 lines at most: a reader holds one file in the head."""
    kinds = {"llmkern": "*.py", "kernels": "*.py", "tests": "*.py", "benchmarks": "*.py", "csrc": "*.[hc]*"}
    kinds["tests/sanitize"] = "*.[hc]*"
    long = {
        str(path.relative_to(ROOT)): count
        for folder, pattern in kinds.items()
        for path in (ROOT / folder).rglob(pattern)
        if (count := path.read_text().count("\n")) > 400
    }
    assert not long, long


def test_functions_are_short() -> None:
    """60 lines at most, without arguments and docstring."""
    # All of a time loop, whose parts share its registers; 40 arguments each.
    allowed = {"rnn_forward_kernel", "rnn_backward_kernel"}
    long = {}
    for path in (
        path for folder in ("llmkern", "kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in allowed:
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                lines = (node.body[-1].end_lineno or 0) - first.lineno + 1
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert not long, long


def test_every_unit_of_the_core_is_checked_under_the_sanitizers() -> None:
    # Some are checked with what they are parts of.
    parts = {"elementwise": "runtime", "probe": "runtime", "rnn_norm": "rnn", "table_gradient": "embedding"}
    files = (ROOT / "tests" / "sanitize").glob("*.cpp")
    checked = {
        name for path in files for name in re.findall(r"^LLMKERN_CHECK\((\w+)\)", path.read_text(), re.MULTILINE)
    }
    units = {parts.get(path.stem, path.stem) for path in (ROOT / "csrc" / "core" / "isa").glob("*.cpp")}
    assert units <= checked


# What the documents tell anybody to run: the file that runs it, and how it says so there. Targets of make: .ci/run.
COVERED = {
    "pip install torch": ("Makefile", "install torch==$(TORCH)"),
    "pip install pytest": ("Makefile", "install -e '.[test]'"),
    "pip install .": ("tests/test_install.py", '"tree": (source,)'),
    "python -m build": ("Makefile", "-m build --no-isolation"),
    "pre-commit install": (".ci/run", "pre-commit run --all-files"),
    ".ci/run": (".ci/run", "exec make test"),
    "make clean": ("tests/test_install.py", '"clean"'),
    "pytest benchmarks": ("tests/test_benchmarks.py", '"pytest", "benchmarks"'),
    "pytest tests/test_benchmarks.py": ("tests/test_benchmarks.py", "def test_every_installed_peer_matches"),
    "pytest tests/test_layer_norm.py": ("tests/test_layer_norm.py", "def test_any_shape_and_stride"),
    "gdb": (".ci/run", "gdb -batch"),
    "objdump": (".ci/run", "objdump -d"),
    "perf": (".ci/run", "perf record"),
    "python tests/kernel_gate.py": ("tests/test_kernel_gate.py", "kernel_gate.measure_all("),
    "python tests/interpreter.py": ("tests/test_interpreter.py", "interpreter.write("),
    "python tests/kernel_traffic.py": ("tests/interpreter.py", '"kernel_traffic.py"'),
    "llmkern demo": ("tests/test_cli.py", 'command("demo"'),
    "llmkern info": ("tests/test_cli.py", 'command("info"'),
    "llmkern bench": ("tests/test_benchmarks.py", "_bench(*arguments"),
    **{
        f"llmkern bench {name}": ("tests/test_benchmarks.py", f'_bench("{name}"')
        for name in ("compare", "page", "plots", "readme", "table")
    },
}
# Peers are gigabytes to install; the others need a GPU.
NOT_COVERED = {"make bench-peers", "benchmarks/gpu_run.sh", "pytest -m gpu", "ncu"}
PAGES = ("README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "docs/configuration.md", "docs/performance.md")


def commands(page: str) -> set[str]:
    """The commands that a page shows in blocks and spans of code, without variables, options and where they lie."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = set()
    for line in [line for block in blocks for line in block.splitlines()] + spans:
        line = re.sub(r"^(?:[A-Z_]+=\S+ )*(?:\S+/bin/)?", "", line)
        line = re.sub(r"^python -m (?=llmkern |pytest )", "", line)
        known = re.match(
            r"make [a-z-]+|pip install [\w.]+|python -m build|python tests/\w+\.py|pre-commit \w+|\.ci/run$|"
            r"benchmarks/\w+\.sh|pytest (?:-m gpu|(?:-x )?tests/\w+\.py|benchmarks)|llmkern bench [a-z]+|"
            r"llmkern [a-z]+(?= |$)|(?:gdb|objdump|perf|ncu)(?= )",
            line,
        )
        if known:
            found.add(known[0].replace(" -x ", " "))
        # A command of a kind that this test does not know would pass unseen.
        tools = "make|pip|python|pytest|pre-commit|cmake|git|llmkern|gdb|objdump|perf|ncu"
        assert known or not re.match(rf"(?:{tools}) [a-z-]", line), line
    return found


def test_every_command_of_the_documents_is_run() -> None:
    """By a test, or by CI: as it stands, or at its smallest."""
    targets = {f"make {name}" for name in re.findall(r"^#   make ([\w-]+)", (ROOT / "Makefile").read_text(), re.M)}
    run = set(re.findall(r"^(?:exec )?(make [\w-]+)", (ROOT / ".ci" / "run").read_text(), re.M))
    named = set().union(*map(commands, PAGES))
    assert {command for command in named if command.startswith("make ")} <= targets
    assert named | targets == run | COVERED.keys() | NOT_COVERED
    assert not [c for c, (file, text) in COVERED.items() if text not in (ROOT / file).read_text()]
