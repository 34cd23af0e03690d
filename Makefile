# make demo: data, shards, training, evaluation and a picture, from nothing. make test: the whole test suite.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test lint bench clean

demo: .venv/runtime
	$(BIN)/python tools/demo.py --output demo

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/python tools/benchmark.py all

clean:
	rm -rf .venv demo bench

# Two environments in one: what the program needs, and on top of it what its tests need.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/runtime: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/dev: .venv/runtime
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
