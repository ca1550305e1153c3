# Everything runs in a virtual environment of the checkout's own. Needs Python >= 3.11, a C++ compiler and make;
# CMake and Ninja come from the package index. A second call installs nothing again.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt
PYTEST := $(PY) -m pytest
# Processes that share the ordinary tests, one file at a time.
JOBS ?= 2
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow sanitize gpu-check check format wheel wheel-smoke clean

help:
	@echo "make quickstart   install, then quantise, run, score and gate the packaged model"
	@echo "make test         the test suite; test-slow and gpu-check are the rest of it"
	@echo "make sanitize     the native module's tests under AddressSanitizer and UBSan (GCC)"
	@echo "make check        ruff, mypy and the CI files' schemas; format rewrites what ruff can"
	@echo "make wheel        build dist/*.whl; wheel-smoke installs it elsewhere and tries it"
	@echo "make clean        remove what the others made, the virtual environment included"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	    f"error: compress needs Python >= 3.11, and $(PYTHON) is {v}\nhint: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Without build isolation, so that the build tools are pinned too and the build folder is reused. `redirect` editable:
# edits of Python files and of content are live, edits of C++ files install again.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard compress/kernels/cpu/csrc/*) | $(VENV)/bin/python
	$(PIP) setuptools scikit-build-core nanobind cmake ninja
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(PY) scripts/quickstart.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not gpu" -n $(JOBS) --dist loadfile

test-slow: $(INSTALLED)
	HYPOTHESIS_PROFILE=default $(PYTEST) -m slow

sanitize: $(INSTALLED)
	$(PY) scripts/sanitize.py --build build/sanitize

# On a machine with a CUDA device: parity of every kernel on it, then benchmarks, which run and write their record even
# where a test fails. Elsewhere it fails and says so. Nothing is compiled for other GPUs here.
gpu-check: $(INSTALLED)
	$(PY) -m benchmarks.gpu_check --require-gpu
	@status=0; \
	$(PYTEST) -m gpu || status=1; \
	$(PYTEST) tests/kernels/triton tests/runtime/triton -m "not gpu" --ignore=tests/kernels/triton/test_compiling.py \
	    || status=1; \
	$(PY) -m benchmarks.gpu_check || status=1; \
	exit $$status

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m check_jsonschema --builtin-schema vendor.github-workflows $(wildcard docs/ci/github-*.yml)
	$(PY) -m check_jsonschema --builtin-schema vendor.github-actions docs/ci/action.yml
	$(PY) -m check_jsonschema --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci docs/ci/gitlab.yml

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(INSTALLED)
	rm -rf dist
	$(PY) -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist .

wheel-smoke: wheel
	$(PY) scripts/wheel_smoke.py dist constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
