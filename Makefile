# `make demo` and `make test` need nothing but Python >= 3.11 and make: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One more than there are cores: some tests wait for a server most of the time.
WORKERS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
# Modules are compiled when they are first imported: most of what comes along never is. An environment that keeps
# no bytecode would have torch, Ray and the tests compiled anew in every process.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help demo demo-train test test-slow test-airflow check types unit long ray format clean audit

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.demo ## embed, index and search the docstrings of this Python, offline
	$(BIN)/python jobs/demo.py

demo-train: $(VENV)/.demo-train ## train a small reranker for the demo, in about an hour, and measure it
	$(BIN)/python jobs/demo.py --train

# One after the other: side by side they take as long, and a Ray that waits for a core for minutes gives up.
test: check ray ## the tests: `make check` with the longer ones, then those with a real Ray

long: unit ## the quick tests, and longer ones: a faulty store, other packages' figures, whole commands

# Of the files only those are read that have such a test: each worker reads them all before it begins.
ray: $(VENV)/.dev ## the tests with a real Ray, a real S3 server and real weights
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "ray and not slow" \
		$$(grep -rlE 'mark\.ray\b' tests --include='test_*.py')

test-slow: $(VENV)/.slow ## the long ones: search and rerank on Ray, real kills of drivers, actors, nodes and the store, memory
	$(BIN)/python -m pytest -m slow

test-airflow: $(VENV)/.dev .venv-airflow/.ready ## the Airflow DAG on a real Airflow (in an environment of its own) and a real Ray head
	$(BIN)/python -m pytest tests/infra/test_airflow.py

check: $(VENV)/.dev ## format, lint, types, import contracts, quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) -j 2 types unit MARKS="$(MARKS)"

types: $(VENV)/.dev ## types and import contracts
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not a part of `check`: advisories appear without a change here, so that one commit would pass today and fail
# tomorrow, and offline. --strict: what the service does not know is not taken for safe. An advisory that does
# not concern us is left out by --ignore-vuln ID, with its reason in a line here.
audit: $(VENV)/.dev ## ask for known vulnerabilities of the versions in constraints.txt (needs PyPI's advisories)
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip --strict

# Before `test` the longer ones go along with the quick ones: workers read all files for half a minute of a core
# each before they begin, and once is enough.
MARKS := not ray and not slow$(if $(filter test long,$(MAKECMDGOALS)),, and not long and not parity)

# One thread to a process: there are as many processes as cores, and OpenMP's threads spin while they wait.
# Files are begun in the order of tests/conftest.py, the longest first.
unit: $(VENV)/.dev ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "$(MARKS)"

format: $(VENV)/.dev ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what demo and tests leave
	rm -rf demo-out bench-out campaign-out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,demo]'
	@touch $@

$(VENV)/.demo-train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,demo,train]'
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,demo,dev,parity,train]'
	@touch $@ $(VENV)/.demo $(VENV)/.demo-train

$(VENV)/.slow: $(VENV)/.dev
	$(PIP) -e '.[bench,cpu,demo,dev,parity,slow,train]'
	@touch $@

.venv-airflow/.ready: infra/airflow/requirements.txt infra/airflow/constraints.txt
	$(PYTHON) -m venv .venv-airflow
	.venv-airflow/bin/python -m pip install --quiet --disable-pip-version-check -c infra/airflow/constraints.txt -r infra/airflow/requirements.txt
	@touch $@
