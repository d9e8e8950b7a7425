# `make test` and `make demo` start from a bare checkout: Python >= 3.10 and a C++ compiler are enough.
#
#   PYTHON=python3.12   the interpreter that the environment is made with
#   VENV=folder         where the environment goes (.venv); VENV=0 uses PYTHON's own environment as it is, offline
#   TORCH_INDEX=url     where torch is looked for first, for instance PyTorch's index of CPU builds, which are all that
#                       these targets need; default: pip's own index
#   ARGS="..."          more arguments for pytest, the demo or the benchmarks
#
# The HYPERFAST_* and MAX_JOBS switches of the build are listed in docs/environment.md.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
export HYPERFAST_REQUIRE_NATIVE ?= 1
SHELL := /bin/bash

ifeq ($(VENV),0)
RUN := $(PYTHON)
PYTEST := $(RUN) -m pytest
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
RUN := $(VENV)/bin/python
# Not `python -m pytest`: it would put kernels/ on the path under the name of another package.
PYTEST := $(VENV)/bin/pytest
endif

.DEFAULT_GOAL := help
.PHONY: help build build-demo test demo lint types format bench docs clean
.DELETE_ON_ERROR:

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# An environment is stamped per extra. `build_ext --inplace` runs every time: ninja compiles what changed.
INPUTS := pyproject.toml setup.py constraints.txt hyperfast/version.py

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "hyperfast needs Python >= 3.10; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(INPUTS) | $(VENV)/bin/pip
	$(RUN) -m pip install -q -c constraints.txt 'setuptools>=77' wheel pybind11 ninja
	$(if $(TORCH_INDEX),$(RUN) -m pip install -q --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

ifeq ($(VENV),0)
build build-demo:
else
build: $(VENV)/.installed-dev
build-demo: $(VENV)/.installed-demo
endif
build build-demo:  ## compile hyperfast._C in place, in an environment with everything the tests need
	@log=$$(mktemp); $(RUN) setup.py -q build_ext --inplace >$$log 2>&1 || { cat $$log; exit 1; }; tail -n 1 $$log; rm -f $$log

# One process of tests per core, where pytest-xdist is installed: with VENV=0 it may not be.
PARALLEL = $(shell $(RUN) -c 'import xdist' 2>/dev/null && echo '--numprocesses logical --maxprocesses 16 --dist worksteal')

test: build  ## run the tests: operations, packaging, ahead-of-time kernels, nvcc; then Triton's interpreter
	$(PYTEST) $(PARALLEL) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m interpreter $(ARGS)

demo: build-demo  ## train on digits, print the table and write runs/demo/report.html
	$(RUN) -m hyperfast.recipes.demo $(ARGS)

lint: build  ## ruff over everything
	$(RUN) -m ruff check .

format: build  ## sort imports and apply the safe fixes of ruff
	$(RUN) -m ruff check --fix .

types: build  ## mypy --strict over the package
	$(RUN) -m mypy -p hyperfast

bench: build  ## measure everything on this machine; rows go to bench/results/
	$(RUN) bench/run.py $(ARGS)

docs: $(VENV)/.installed-docs  ## build the pages into site/
	$(RUN) -m mkdocs build --strict

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf build dist site *.egg-info hyperfast/_C*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
