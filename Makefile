# `make demo` and `make test` need nothing but Python >= 3.11 and make: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-slow check unit format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.demo ## embed, index and search the docstrings of this Python, offline
	$(BIN)/python jobs/demo.py

test: $(VENV)/.dev ## the tests, with a real Ray, a real S3 server and real weights
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev ## the long ones: search and rerank on Ray, real kills of drivers, actors, nodes and the store, memory
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev ## format, lint, types, import contracts, quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) unit

unit: $(VENV)/.dev ## the tests that need no Ray
	$(BIN)/python -m pytest -q -m "not ray and not slow"

format: $(VENV)/.dev ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what demo and tests leave
	rm -rf demo-out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,demo,dev,parity]'
	@touch $@ $(VENV)/.demo
