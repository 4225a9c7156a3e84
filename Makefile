# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SHELL := /bin/bash

.PHONY: setup demo test test-slow lint slurm clean

setup: $(VENV)/.ready

# Debian without python3-venv has no ensurepip: then the host's pip fills the environment.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Ceteris needs Python 3.11 or newer; run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --without-pip $(VENV)
	@if $(PY) -m pip --version >/dev/null 2>&1; then pip="$(PY) -m pip"; \
	  else pip="$(PYTHON) -m pip --python $(PY)"; fi; \
	  echo "installing into $(VENV) (a few minutes the first time) …"; \
	  $$pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: setup
	@$(PY) run.py sweep demo

test: setup lint slurm
	@$(PY) -m pytest -n 3 --dist loadgroup

test-slow: setup slurm
	@$(PY) -m pytest -m slow

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# A real Slurm for the tests: installed where that is safe, otherwise said. Never an error.
slurm:
	@bash tests/slurm_packages.sh

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info build
