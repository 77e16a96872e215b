# `make run`, `make frontier` and `make test` set everything up themselves: a .venv from pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/quickstart.yaml
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run frontier test check bench clean

run: .venv/ready
	$(BIN)/kr run $(CONFIG)

frontier: .venv/ready
	$(BIN)/kr frontier configs/frontier_quickstart.yaml

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/kr bench --out runs/bench/bench.json --markdown runs/bench/bench.md

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
