# make train: the environment, then the quickstart, and the smaller models inside it as runs of their own.
# make test: the environment, then the tests. make test-all: the slow ones too, and those that compile for accelerators.
# The environment is .venv, made from requirements.lock once and again when that file or pyproject.toml changes.
# For an accelerator, after `make env`:  .venv/bin/uv pip install -c requirements.lock -e '.[cuda]'   (or '.[tpu]')

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
# Two test processes, each with whole files, so that what a file sets up is made once; JAX stays on the CPU.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
SIZES := 0.5 0.25 0.125

.PHONY: train test test-all test-faults ahead lint format env lock clean

# What was extracted before stays as it is; what was stopped before it had a checkpoint is extracted anew.
train: env
	$(BIN)/efficient-lm train experiment=quickstart
	@for size in $(SIZES); do \
		run=runs/quickstart-$$size; \
		ls $$run/checkpoints 2>/dev/null | grep -qx '[0-9]*' && continue; \
		rm -rf $$run; \
		$(BIN)/efficient-lm extract checkpoint=runs/quickstart output=$$run ffn=$$size || exit; \
	done

test: env
	$(PYTEST) -m "not slow and not faults"

# Also what compiles for TPUs and GPUs that are not there: the tests alone see the compilers, for with them on its path
# JAX looks for a TPU whenever it starts.
test-all: env .ahead/.installed
	PYTHONPATH=.ahead $(PYTEST) -m "not faults"

# A run of two processes that is killed a hundred times; FAULT_KILLS, FAULT_PROCESSES and FAULT_SEED say otherwise.
test-faults: env
	FAULT_PROCESSES=$${FAULT_PROCESSES:-2} $(BIN)/python -m pytest -s -m faults tests/faults

ahead: .ahead/.installed

.ahead/.installed: requirements.ahead.lock | env
	@echo "Installing compilers for TPUs and Hopper GPUs (1.4 GB) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps --require-hashes --upgrade --target .ahead -r requirements.ahead.lock
	@touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)

# uv installs the lock in seconds where pip takes most of a minute; pip stands in where uv cannot run.
$(STAMP): requirements.lock pyproject.toml | .venv/bin/python
	@awk '/^[^ ]/ { keep = /^(uv|setuptools)==/ } keep' requirements.lock > .venv/bootstrap.lock
	@$(BIN)/python -m pip install --quiet --no-compile --require-hashes -r .venv/bootstrap.lock
	@echo "Installing what requirements.lock lists ..."
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --require-hashes --no-build-isolation-package antlr4-python3-runtime -r requirements.lock \
		|| $(BIN)/python -m pip install --quiet --no-compile --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv/bin/python:
	@usable() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }; \
	for python in $$PYTHON python3 python3.13 python3.12 python3.14; do \
		if usable $$python; then exec $$python -m venv .venv; fi; \
	done; \
	if command -v uv >/dev/null; then exec uv venv --quiet --seed --python '>=3.12' .venv; fi; \
	echo "error: Python 3.12 or newer (with venv) is needed and was not found." >&2; \
	echo "Install it ('apt install python3.12 python3.12-venv', 'brew install python@3.12', or uv) or name one: make train PYTHON=/path/to/python3" >&2; \
	exit 1

# Refresh every pinned version; jax moves on purpose, with the tests, and so is named here.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.12 --extra dev --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --upgrade --constraint <(echo jax==0.11.2) --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile --python-platform x86_64-manylinux_2_31 --python-version 3.12 --extra ahead --generate-hashes \
		--no-annotate --no-header --no-emit-index-url --upgrade --constraint requirements.lock \
		--constraint <(printf "jax-cuda13-plugin==0.11.2\nlibtpu==0.0.48.1\n") pyproject.toml \
		| awk '/^[^ ]/ { keep = /^(libtpu|jax-cuda13|nvidia)/ } keep' > requirements.ahead.lock

clean:
	rm -rf .venv .ahead .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
