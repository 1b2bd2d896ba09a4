# The whole workflow; every target sets up what it needs in .venv.
#
#   make help    this list
#   make demo    train one model with torch.nn and with llmkern.nn (ARGS="--epochs 2 --bf16" passes options on)
#   make test    the test suite (ARGS="-k lstm" passes options on)
#   make sanitize  the C++ core under the sanitizers, on every instruction set of this CPU (ARGS=gemm: one op's check)
#   make bench   the benchmark suite's quick part, FULL=1 for all of it
#   make bench-peers  the libraries to compare with, in .venv-peers; `make bench PEERS=1` measures there
#   make lint    ruff, clang-format, mypy, clang-tidy
#   make debug   the editable install with libraries for gdb: symbols, little optimisation
#   make wheel   a wheel and an sdist in dist/
#   make dev     an editable install with everything that tests and lint need
#   make clean   remove .venv and every build product

PYTHON ?= python3
TORCH ?= 2.13.0
# Test processes side by side; a file is one's, so that two never build in one folder.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The machine's, or else one in .venv. (The redirection makes old makes ask a shell.)
CMAKE := $(or $(shell command -v cmake 2>/dev/null),$(BIN)/cmake)
PEERS_PIP := $(VENV)-peers/bin/python -m pip --disable-pip-version-check

# What the native libraries are made of, and what else a plain install copies.
NATIVE := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
SOURCES := $(NATIVE) $(shell find llmkern kernels benchmarks -name '*.py' 2>/dev/null)

# One folder of compiled objects for every install and every wheel.
export LLMKERN_BUILD_DIR ?= $(CURDIR)/build/native
# A warning of the compiler fails a build here, but no user's.
export LLMKERN_WERROR ?= 1

.PHONY: help demo test sanitize bench bench-peers lint debug wheel dev clean

help:
	@sed -n 's/^#   //p' Makefile

# The console script, not `python -m`: that would import the source tree, not what was installed.
demo: $(VENV)/.demo
	$(BIN)/llmkern demo $(ARGS)

test: $(VENV)/.test
	LLMKERN_TEST_REQUIRE=native OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Leaks: a container may forbid to look for them, and libgomp's threads are none of ours. What waits sleeps, because there
# are more threads than some machines have cores.
sanitize: $(CMAKE)
	$(CMAKE) -S . -B build/sanitize -DLLMKERN_SANITIZE=ON
	$(CMAKE) --build build/sanitize --parallel $$(getconf _NPROCESSORS_ONLN)
	@for isa in baseline avx2 avx512; do \
	  ASAN_OPTIONS=$${ASAN_OPTIONS-detect_leaks=0} OMP_WAIT_POLICY=passive LLMKERN_POISON=1 LLMKERN_CPU_ISA=$$isa \
	    build/sanitize/sanitize $(ARGS) || exit; \
	done

bench: $(if $(PEERS),$(VENV)-peers/.peers,$(VENV)/.test)
	$(if $(PEERS),$(VENV)-peers/bin/llmkern,$(BIN)/python -m llmkern) bench $(if $(FULL),,--quick) $(ARGS)

bench-peers: $(VENV)-peers/.peers

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/sanitize -name '*.cpp' -o -name '*.h')
	$(BIN)/mypy
	@printf '%s\n' csrc/core/*.cpp csrc/core/isa/*.cpp csrc/torch/*.cpp | xargs -P $$(getconf _NPROCESSORS_ONLN) -n 8 \
	  sh -c '$(BIN)/clang-tidy --quiet --experimental-custom-checks "$$@" -- $(TIDY_FLAGS) 2>/dev/null' clang-tidy

# Each file once, the vector code as for AVX-512. Headers such as omp.h are the compiler's, where clang has none.
TORCH_INCLUDE = $(wildcard $(VENV)/lib/python*/site-packages/torch/include)
TIDY_FLAGS = -std=c++20 -Icsrc -isystem $(TORCH_INCLUDE) -DTORCH_TARGET_VERSION=0x020a000000000000 -fopenmp \
  $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v4 -DLLMKERN_ISA=avx512,-DLLMKERN_ISA=baseline) \
  -idirafter $$($(CXX) -print-file-name=include)

# Without isolation: an environment that `build` makes for itself has no torch, whose headers the build needs.
wheel: $(VENV)/.wheel
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" LLMKERN_BUILD=require $(BIN)/python -m build --no-isolation --outdir dist

dev: $(VENV)/.test $(VENV)/.lint

# The next `make test` puts the fast libraries back. Compilers that optimise little warn of what cannot be.
debug: $(VENV)/.test
	LLMKERN_DEBUG=1 LLMKERN_WERROR=0 LLMKERN_BUILD_DIR=$(CURDIR)/build/debug LLMKERN_BUILD=require \
	  $(PIP) install -e '.[test]'
	rm $(VENV)/.test

clean:
	rm -rf $(VENV) $(VENV)-peers build dist *.egg-info llmkern/*.so llmkern/_build_info.json

# --- .venv, one stamp per step --------------------------------------------------------------------------------------
$(VENV)/.torch-$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llmkern needs Python 3.10 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH)
	rm -f $(VENV)/.torch-* $(VENV)/.demo $(VENV)/.test
	touch $@

# A plain and an editable install replace each other, and so do their stamps.
$(VENV)/.demo: $(VENV)/.torch-$(TORCH) $(SOURCES)
	LLMKERN_BUILD=require $(PIP) install '.[demo]'
	rm -f $(VENV)/.test
	touch $@

$(VENV)/.test: $(VENV)/.torch-$(TORCH) $(NATIVE)
	LLMKERN_BUILD=require $(PIP) install -e '.[test]'
	rm -f $(VENV)/.demo
	touch $@

# The peers of the benchmarks. FBGEMM's versions go with torch's: 1.8 with 2.13. One that is not to be had here is left
# out; the benchmarks say so. torch is named each time, or a peer may bring another one.
PEER_PACKAGES ?= jax openvino onnxruntime onnx tensorflow-cpu fbgemm-gpu-cpu==1.8.0

$(VENV)-peers/.peers: $(VENV)-peers/.installed $(SOURCES)
	LLMKERN_BUILD=require $(PEERS_PIP) install '.[demo]'
	touch $@

$(VENV)-peers/.installed:
	test -x $(VENV)-peers/bin/python || $(PYTHON) -m venv $(VENV)-peers
	echo '*' > $(VENV)-peers/.gitignore
	$(PEERS_PIP) install torch==$(TORCH)
	for package in $(PEER_PACKAGES); do \
	  $(PEERS_PIP) install torch==$(TORCH) $$package || echo "bench-peers: $$package is not to be had here"; \
	done
	touch $@

# What pyproject.toml lists under a name.
listed = $(BIN)/python -c 'import re, pathlib; \
  print(*re.findall(r"\"(.+?)\"", re.search(r"^$(1) = (.*)", pathlib.Path("pyproject.toml").read_text(), re.M)[1]))'

$(VENV)/.lint: $(VENV)/.torch-$(TORCH) pyproject.toml
	$(PIP) install $$($(call listed,lint))
	touch $@

$(BIN)/cmake: $(VENV)/.torch-$(TORCH)
	$(PIP) install 'cmake>=3.25'
	touch $@

$(VENV)/.wheel: $(VENV)/.torch-$(TORCH) pyproject.toml
	$(PIP) install build $$($(call listed,requires))
	touch $@
