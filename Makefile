# The five verbs of Stillhouse; the same ones locally and in CI. Each does the set-up it needs.
PYTHON ?= python3.11
ifeq (,$(shell command -v $(PYTHON) 2>/dev/null))
PYTHON := python3
endif
PY := .venv/bin/python
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest
DEMO_ARGS ?=
# Engines and jobs are processes of their own; without bytecode each would compile everything again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# Tests share ports, cores and engines, whatever -j says.
.NOTPARALLEL:
.PHONY: help setup demo test lint unit integration e2e bench lock clean

help:  ## show the verbs
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup:  ## make .venv and .venv-compress from the lock files (seconds when they are ready)
	@$(PYTHON) requirements/install.py

demo: setup  ## the whole loop on this machine, up to 15 minutes: runs/demo/report.html at the end
	@$(PY) -m demo.run $(DEMO_ARGS)

lint: setup  ## ruff, mypy --strict, import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

test: lint unit integration e2e  ## everything: lint, unit, contract, integration, the demo at a small size

unit: setup  ## the fast tests only
	$(PYTEST) tests -n 2 --dist loadfile -m "not integration and not e2e"

integration: setup  ## real servers, engines and Ray
	$(PYTEST) tests -n 2 --dist loadfile -m "integration and not whole"
	$(PYTEST) tests -m whole

e2e: setup  ## the demo at a small size, as a test
	$(PYTEST) tests/e2e

bench: setup  ## make bench BENCH=name
	@test -n "$(BENCH)" || (echo "usage: make bench BENCH=name (a folder of benchmarks/)"; exit 2)
	@test -d "benchmarks/$(BENCH)" || (echo "no benchmark '$(BENCH)'; there are: $$(ls benchmarks)"; exit 2)
	@$(PY) -m benchmarks.$(BENCH)

lock: ## resolve requirements/*.in into the lock files
	@$(PYTHON) requirements/install.py --relock

clean:  ## remove what runs wrote (not the environments)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
