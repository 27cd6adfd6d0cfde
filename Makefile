# Two commands carry the project: `make demo` shows the main job, `make test` runs the whole suite.
# Each makes .venv and installs what it needs the first time, and again when what is asked for has changed.

VENV   ?= .venv
# Any python from 3.10 on that can make a virtual environment; evaluated only when one has to be made.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python3.10; do \
	    $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 \
	    && { echo $$p; break; }; done)
PY     := $(VENV)/bin/python
# --no-compile: compiling every module of torch, scipy and numba to bytecode takes longer than unpacking them, and Python
# does it by itself for the modules that are imported.
PIP    := $(PY) -m pip install --disable-pip-version-check --no-input --no-compile --quiet
BUILD  := pyproject.toml $(wildcard setup.py csrc/*.* csrc/*/*.*)
DEMO   ?= demo

.PHONY: help demo test lint types docs bench wheel wheel-test clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1: \2/p' Makefile

demo: $(VENV)/.cli  ## train, distil, evaluate and report on two bundled data sets; result in ./demo
	$(PY) -m gdpd.cli demo --folder $(DEMO)

test: $(VENV)/.dev  ## the whole test suite with coverage
	$(PY) -m pytest --cov --cov-report=term --cov-fail-under=90

lint: $(VENV)/.dev  ## ruff over everything
	$(PY) -m ruff check .

types: $(VENV)/.dev  ## mypy over both packages
	$(PY) -m mypy

docs: $(VENV)/.dev  ## links and docstrings, then the documentation as a site in site/; warnings are errors
	$(PY) docs/check.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

bench: $(VENV)/.dev  ## every benchmark once, at its smallest size, to see that it runs
	$(PY) -m bench.smoke

wheel: $(VENV)/.dev  ## sdist and manylinux wheel in dist/, built without torch, checked and tried
	rm -rf dist
	$(PY) -m build --outdir dist/plain
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir dist dist/plain/*.whl
	mv dist/plain/*.tar.gz dist && rm -rf dist/plain
	$(PY) packaging/check_wheel.py dist/*.whl
	$(PY) packaging/check_sdist.py dist/*.tar.gz

# In an environment and a folder of its own, so that the wheel is what runs, and nothing of the clone; the record of
# Triton's kernels is the clone's.
TORCH ?= 2.9.1
wheel-test: $(VENV)/.dev  ## the kernels' tests on the wheel in dist/ with another torch: make wheel-test TORCH=2.9.1
	@ls dist/*.whl >/dev/null
	rm -rf build/wheel-test && mkdir -p build/wheel-test && cp -r tests/gdpd_kernels build/wheel-test/tests
	$(PY) -m venv build/wheel-test/env
	build/wheel-test/env/bin/python -m pip install --disable-pip-version-check --no-compile --quiet \
	  "torch==$(TORCH)" "$$(ls dist/*.whl)[triton]" "pytest>=8.2" "hypothesis>=6.100" "diffusers>=0.35"
	cd build/wheel-test/tests && ../env/bin/python -c "import gdpd_kernels as gk; native = gk.backends()[0]; \
	  assert 'site-packages' in gk.__file__ and native['usable'], (gk.__file__, native)"
	cd build/wheel-test/tests && ../env/bin/python -m pytest -q -m "not gpu" --ignore=test_triton_static.py

clean:  ## remove what was built or measured, keep .venv
	rm -rf build dist site .coverage .asv .pytest_cache .mypy_cache .ruff_cache .hypothesis $(DEMO)

# Tests hold losses to torchdistill's and mmrazor's own, for which these need none of their dependencies.
# torch first and pinned: the package asks for no more than torch>=2.9, so left to itself pip may choose another
# release. No build isolation: pybind11 and setuptools are already there, and the optional compiled module then
# builds once, in place; without a compiler setup.py leaves it out.
$(PY):
	@test -n "$(PYTHON)" || { echo "no python >= 3.10 with venv found; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: requirements-dev.txt | $(PY)
	@echo "installing the pinned torch and the build tools into $(VENV)"
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.cli: $(VENV)/.torch $(BUILD)
	@echo "installing gdpd-kernels with its command line"
	$(PIP) --no-build-isolation -e ".[cli]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD)
	@echo "installing gdpd-kernels with its development tools"
	$(PIP) --no-build-isolation -e ".[dev]"
	$(PIP) --no-deps "torchdistill==1.1.5" "mmrazor==1.0.0"
	@touch $@ $(VENV)/.cli
