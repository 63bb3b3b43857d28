# Every target does its own set-up: the first one on a fresh machine makes .venv, installs torch and the tools, and builds.
#
# Uses the active virtual environment if there is one, or the interpreter given as PYTHON=...; neither: .venv.
# TORCH=...        which torch to install if there is none, e.g. TORCH='torch==2.11.*'
# The build reads  MAX_JOBS, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MARLIN_BUILD, CMAKE_ARGS   (see setup.py)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

TORCH ?= torch>=2.11
NVCC ?= $(or $(shell command -v nvcc),$(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc)
ARGS ?=
TOOLS ?= memcheck racecheck synccheck initcheck

ifdef PYTHON
  PY := $(shell command -v $(PYTHON))
  # One stamp per interpreter, since the environment isn't ours to write into.
  STAMPS := build/stamps-$(shell printf %s '$(PY)' | cksum | cut -d' ' -f1)
else ifdef VIRTUAL_ENV
  PY := $(VIRTUAL_ENV)/bin/python
  STAMPS := build/stamps-$(shell printf %s '$(PY)' | cksum | cut -d' ' -f1)
else
  PY := .venv/bin/python
  STAMPS := .venv/stamps
endif

# A Python that can make environments and has the headers which the extension needs.
SUITABLE := import ensurepip, pathlib, sys, sysconfig, venv; \
  sys.exit(sys.version_info < (3, 10) or not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
HAS_TORCH := import importlib.metadata as m; \
  sys_exit = __import__("sys").exit; v = m.version("torch").split("."); sys_exit((int(v[0]), int(v[1])) < (2, 11))
NATIVE := $(shell find csrc CMakeLists.txt setup.py pyproject.toml -type f 2>/dev/null)
CPP := $(shell find csrc tests/cpp benchmarks/bare -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' \))

.PHONY: help demo test gpu-test sanitize cpp-test bare consumer-test build lint format wheel clean distclean
help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: build ## convert a small model, run it, show what was gained
	$(PY) tests/demo.py $(ARGS)

test: build ## Python tests; those that need a GPU say so when skipped
	$(PY) -m pytest $(ARGS)

gpu-test: build ## only the tests that need a GPU
	$(PY) -m pytest -m gpu $(ARGS)

sanitize: build ## every kernel under compute-sanitizer (needs a GPU); TOOLS=racecheck ARGS=hopper: a part
	for tool in $(TOOLS); do \
	  SANITIZER=$$tool PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) tests/sanitizer_workload.py $(ARGS); done

cpp-test: build ## C++ tests (needs GoogleTest: apt install libgtest-dev)
	$(ENVIRONMENT) cmake -S . -B build/cmake -DMARLIN_BUILD_TESTS=ON
	$(ENVIRONMENT) cmake --build build/cmake --target marlin_tests --parallel $${MAX_JOBS:-$$(nproc)}
	$(ENVIRONMENT) ctest --test-dir build/cmake --output-on-failure

bare: ## build/bare/{memory,loop,issue}: what the hardware allows, for an H200 (needs nvcc)
	mkdir -p build/bare
	for name in memory loop issue; do \
	  $(NVCC) -O3 -std=c++20 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include \
	    -o build/bare/$$name benchmarks/bare/$$name.cu csrc/cuda/sm90/tensor_map.cu; done

consumer-test: wheel ## a C++ project that uses the installed wheel through find_package
	rm -rf build/installed build/consumer
	$(PY) -m pip install -q --no-deps --target build/installed build/wheels/marlin-*.whl
	$(ENVIRONMENT) cmake -S tests/cpp/consumer -B build/consumer -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$$( \
	  cd build/installed && $(abspath $(PY)) -m marlin --cmake-dir);$$( \
	  $(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	$(ENVIRONMENT) cmake --build build/consumer
	$(ENVIRONMENT) ctest --test-dir build/consumer --output-on-failure

build: $(STAMPS)/built ## the extension, in place (what `pip install -e .` does)

lint: $(STAMPS)/tools ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(ENVIRONMENT) clang-format --dry-run -Werror $(CPP)

format: $(STAMPS)/tools ## rewrite every file to the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENVIRONMENT) clang-format -i $(CPP)

wheel: build ## build/wheels/marlin-*.whl
	rm -rf build/wheels
	$(ENVIRONMENT) $(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheels .

clean: ## what was built, not the environment
	rm -rf build dist *.egg-info marlin/*.so marlin/include marlin/lib marlin/share .venv/stamps/built

distclean: clean ## also .venv
	rm -rf .venv

# cmake and ninja come from the environment's own wheels.
ENVIRONMENT = PATH="$(abspath $(dir $(PY))):$$PATH"

.venv/bin/python:
	@for python in python3.12 python3.13 python3.11 python3.10 python3.14 python3; do \
	  if $$python -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "no Python >= 3.10 with venv and headers found (Debian, Ubuntu: apt install python3-dev python3-venv)" >&2; exit 1; \
	fi; \
	share=; if $$found -c '$(HAS_TORCH)' >/dev/null 2>&1; then share=--system-site-packages; fi; \
	echo "making .venv with $$found $$share"; \
	$$found -m venv $$share .venv

# Everything that pyproject.toml names for building, running and judging, torch included; what is there already stays.
define LIST_REQUIREMENTS
try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
extras = project["project"]["optional-dependencies"]
wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
wanted += [item for extra in ("test", "dev", "demo") for item in extras[extra]]
print(*(item for item in wanted if not item.startswith("marlin[")), sep="\n")
endef
export LIST_REQUIREMENTS

$(STAMPS)/tools: pyproject.toml | $(PY)
	mkdir -p $(@D)
	$(PY) -c "$$LIST_REQUIREMENTS" > $(@D)/requirements.txt
	$(PY) -m pip install -r $(@D)/requirements.txt '$(TORCH)'
	touch $@

$(STAMPS)/built: $(NATIVE) $(STAMPS)/tools
	$(ENVIRONMENT) $(PY) -m pip install -v --no-build-isolation --no-deps -e .
	touch $@
