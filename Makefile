# Every target sets up .venv when it is missing or when the dependency files changed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test test-all test-oldest claims-test lint format bench setup

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python >= 3.11 or run: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup        ## the whole path on the bundled synthetic videos, CPU only
	$(BIN)/pipeline demo

# Two processes of one thread each: tests start programs of their own, which would fight over more.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup        ## the suite without its slow tests
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

test-all: setup    ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-oldest: setup ## the same with the oldest versions that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest --resolution lowest-direct -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST) -m "not slow"

claims-test: setup ## the tests of the study in experiments/claims
	$(BIN)/python -m pytest experiments/claims/tests

lint: setup        ## lint, format check, type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup       ## every benchmark; results as dated JSON in benchmarks/results
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done
