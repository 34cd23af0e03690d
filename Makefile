# make demo: data, shards, training, evaluation and a picture, from nothing. make check: before
# each commit. make test: the whole test suite.
PYTHON ?= python3
# Tests that run at the same time. Many of them start jobs of several processes.
TESTS_AT_ONCE ?= 2
PYTEST := pytest -n $(TESTS_AT_ONCE) --dist worksteal
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test check lint gpu mutants audit constraints lowest bench clean

demo: .venv/runtime
	$(BIN)/python tools/demo.py --output demo

test: .venv/dev
	$(BIN)/python -m $(PYTEST)

# Before each commit: all but the tests that take long.
check: lint
	$(BIN)/python -m $(PYTEST) -q -m 'not slow and not multihost and not gpu and not long'

# What only a GPU can show, in about ten minutes: the tests that need one, then its benchmark.
gpu: .venv/dev
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    mkdir -p bench && $(BIN)/python -m pytest -q -m gpu && \
	    $(BIN)/python tools/benchmark.py gpu --runs 3 --seconds 4 --json bench/gpu.json; \
	else echo "make gpu: no GPU is visible, so nothing was run"; fi

# Changes the code in small ways and counts the changes that its tests notice.
mutants: .venv/dev
	mkdir -p bench
	$(BIN)/python tests/support/mutants.py --json bench/mutants.json

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Asks the Python Package Index whether vulnerabilities of the installed packages are known. Strict: a package for which
# there is no answer is a failure. +cpu and the like are removed: they are builds of the same version.
audit: .venv/audit
	$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' > .venv/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement .venv/installed.txt || \
	    { echo "audit: error: vulnerabilities are known, or the index that knows them was not reached (see above)"; exit 1; }

# The newest versions that pyproject.toml allows, in an environment of its own; where the tests pass, constraints.txt
# names them. Afterwards `make clean test` installs them here.
constraints:
	rm -rf .newest && $(PYTHON) -m venv .newest && .newest/bin/pip install --quiet --editable '.[dev]'
	PATH="$(CURDIR)/.newest/bin:$$PATH" .newest/bin/python -m $(PYTEST) -q
	version=$$(.newest/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && { grep '^#' constraints.txt; \
	    .newest/bin/pip freeze --exclude-editable | sed "s/+.*//; s/\$$/ ; python_version >= \"$$version\"/"; } > .newest/new
	mv .newest/new constraints.txt && rm -rf .newest

# The lowest versions that pyproject.toml allows, in an environment of their own, with the tests of `make check`.
lowest:
	rm -rf .lowest && $(PYTHON) -m venv .lowest && .lowest/bin/pip install --quiet uv
	.lowest/bin/uv pip install --quiet --python .lowest/bin/python --resolution lowest-direct --editable '.[dev]' 'setuptools>=77'
	PATH="$(CURDIR)/.lowest/bin:$$PATH" .lowest/bin/python -m $(PYTEST) -q \
	    -m 'not slow and not multihost and not gpu and not long'
	rm -rf .lowest

bench: .venv/dev
	$(BIN)/python tools/benchmark.py all

clean:
	rm -rf .venv .newest .lowest demo bench

# Two environments in one: what the program needs, and on top of it what its tests need.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/runtime: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) --constraint constraints.txt --editable .
	touch $@

.venv/audit: .venv/dev
	$(INSTALL) --constraint constraints.txt --editable '.[audit]'
	touch $@

.venv/dev: .venv/runtime
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@
