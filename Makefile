# What a new user needs; all install what is missing first. Only python >= 3.11, git and make are required.
#   make demo    train -> tune -> evaluate + measure -> report, on a local Ray; everything lands under runs/demo
#   make test    the tests, but for the slow ones
#   make check   style, types and all tests: what must be green before a change is merged
#   make trials  slow fault injections: half a minute to minutes each
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Some machines forbid compiled files. Here hundreds of processes are started, and each would compile the house again.
export PYTHONDONTWRITEBYTECODE :=

# Two processes, but one for all files that start Ray (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test check trials lint install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "diffprune needs Python 3.11 or newer; $(PYTHON) is older. Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/diffprune demo

test: $(STAMP)
	$(PYTEST) -m 'not slow and not gpu and not trial'

check: lint
	$(PYTEST)

trials: $(STAMP)
	$(BIN)/python -m pytest -m trial -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
