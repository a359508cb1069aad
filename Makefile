# `make demo` on a fresh machine: Python 3.11 or newer and make are all it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.smoltulu-installed

# Interpreters to try: the first that is new enough and can make a virtual environment is taken.
PYTHON ?= python3.11 python3.12 python3.13 python3 python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# Options for installing torch alone, for example an index with its CPU build: make setup TORCH_ARGS="--index-url ..."
TORCH_ARGS ?=

# Processes that run the tests.
WORKERS ?= 2
MARKS := not gpu$(if $(SMOLTULU_SLOW),, and not slow)

.PHONY: help setup demo test test-all test-gpu faults lint format up down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(STAMP) ## virtual environment with everything that is pinned

# An environment that was left half made, or whose Python is gone, is made again.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
		for candidate in $(PYTHON); do \
			if "$$candidate" -c '$(USABLE)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "smoltulu needs Python 3.11 or newer with the venv module; tried: $(PYTHON)."; \
			echo "Install one (on Debian and Ubuntu: python3.11 and python3.11-venv), or: make setup PYTHON=/path/to/python3.11"; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$("$$found" --version)"; \
		"$$found" -m venv --clear $(VENV); \
	fi
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## the whole pipeline on the tiny recipe, with a server and a worker of its own
	@$(BIN)/python -m smoltulu.flows.cli.demo

# A file at a time to each worker: what a module sets up is set up once. One thread each, or they wait for one another.
test: setup ## the tests, by WORKERS=2 processes; SMOLTULU_SLOW=1 adds the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(MARKS)" $(ARGS)

test-all: ## the tests, slow ones too
	@$(MAKE) --no-print-directory test SMOLTULU_SLOW=1

test-gpu: setup ## the tests that need a GPU
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest -m gpu $(ARGS)

# Stopped or killed, it goes on: results lie in the user's cache, by seed, size and code.
faults: setup ## the fault campaign: power cuts in virtual time; processes killed, full disks, flipped bytes; half an hour
	$(BIN)/python -m tests.faults.simulated
	$(BIN)/python -m tests.faults $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

up: setup ## server, pool, deployments and worker in the background
	@$(BIN)/smoltulu up

down: ## stop what `make up` started
	@if [ -x $(BIN)/smoltulu ]; then $(BIN)/smoltulu down; else echo "nothing is installed, so nothing runs"; fi

clean: down ## remove the environment and Prefect's state; artifacts stay
	rm -rf $(VENV) .smoltulu build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
