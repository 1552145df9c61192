# `make` or `make help` lists what there is. Needs Python 3.11+ as python3 (or PYTHON=...), nothing else: the first target
# that needs it makes .venv/ from requirements.lock (what runs) and requirements-dev.lock (what checks and tests).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
MADE := .venv/.made-by-make
MADE_DEV := .venv/.made-for-tests
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( n < 2 ? 2 : n > 5 ? 6 : n + 1 )))
ARGS ?=
TESTS ?= tests

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="..." is passed on:  make demo ARGS="--buyers 2000 --units 100 --json"'
	@echo '  TESTS="..." chooses:      make pytest TESTS="tests/test_up.py -x"'

# Everything a set-up says goes to standard error: standard output belongs to the command (demo --json).
# Written last, so that an interrupted set-up is done again. --no-build-isolation: hatchling is in the lock already.
$(MADE): requirements.lock pyproject.toml
	@exec 1>&2; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fairdrop needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }; \
	echo "making .venv from requirements.lock (once) ..."; \
	test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	$(PIP) -r requirements.lock; \
	$(PIP) --no-deps --no-build-isolation -e .; \
	touch $@

# --no-compile: one supplier's SDK alone has 179 MB of generated classes that no test imports.
$(MADE_DEV): requirements-dev.lock $(MADE)
	@exec 1>&2; \
	echo "adding what checks and tests need from requirements-dev.lock (once) ..."; \
	$(PIP) --no-compile -r requirements-dev.lock; \
	touch $@

.PHONY: demo
demo: $(MADE) ## run a whole flash sale on real stores before your eyes, ending with the audit
	@$(BIN)/fairdrop demo $(ARGS)

.PHONY: up
up: $(MADE) ## run stores, front, office, worker and sandbox until Ctrl-C
	@$(BIN)/fairdrop up $(ARGS)

.PHONY: load
load: $(MADE_DEV) ## reproduce a peak with Locust, short and headless, with a verdict from the audit
	@$(BIN)/fairdrop rehearse $(ARGS)

.PHONY: bench
bench: $(MADE_DEV) ## measure every goal of the hot path at rest, some ten minutes; ARGS="--quick" to try it
	@$(BIN)/fairdrop bench $(ARGS)

.PHONY: outage
outage: $(MADE_DEV) ## let payment suppliers hang, flap, fail and lie in the middle of a sale; joins must not notice
	@$(BIN)/python -m loadtest.outage $(ARGS)

.PHONY: check
check: $(MADE_DEV) ## static checks only: ruff, format, mypy --strict, import rules, house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy app loadtest
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -q -p no:randomly tests/test_house_rules.py

.PHONY: pytest
pytest: $(MADE_DEV) ## tests only; TESTS="..." chooses
	$(BIN)/pytest $(TESTS)

# Two parts: what measures or needs every processor runs alone, afterwards. Status 5 means that there is none. Tests run in
# any order, and here in the same one each time: ORDER=7 tries another.
ORDER ?= 1
.PHONY: test
test: check ## everything that has to hold: static checks, then all tests, in parallel where possible
	$(BIN)/pytest -q --randomly-seed=$(ORDER) -n $(JOBS) --dist loadgroup -m "not serial and not long" $(TESTS)
	$(BIN)/pytest -q --randomly-seed=$(ORDER) -m "serial and not long" $(TESTS) || test $$? -eq 5

.PHONY: planted
planted: $(MADE_DEV) ## the checker is checked: every planted bug is caught, and without it the same sale is fine
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal --durations=40 tests/chaos/test_planted.py

.PHONY: simulate
simulate: $(MADE_DEV) ## 100,000 simulated histories of payments, releases and draws: ARGS="--seed 1 --count 100000"
	$(BIN)/python -m tests.simulation.run $(ARGS)

SEED ?= 1
RUNS ?= 3
.PHONY: recovery
recovery: $(MADE_DEV) ## how long the service is away after a kill -9 of front, worker, Valkey, Postgres: ARGS="--kills 10"
	$(BIN)/python -m tests.chaos.recovery --seed $(SEED) $(ARGS)

.PHONY: chaos
chaos: $(MADE_DEV) ## break everything in the middle of sales and let the judge look: SEED=1 RUNS=3, ARGS="--only storm"
	$(BIN)/python -m tests.chaos.chaos --seed $(SEED) --runs $(RUNS) $(ARGS)

DIR ?= .campaign
.PHONY: campaign
campaign: $(MADE_DEV) ## the long form of chaos, about an hour; goes on where it was stopped: DIR=.campaign, ARGS=--summary
	$(BIN)/python -m tests.chaos.chaos --campaign $(DIR) $(ARGS)

.PHONY: ha
ha: $(MADE_DEV) ## let replicas of Redis (Sentinel) and Postgres take over in the middle of sales: SEED=1 RUNS=3
	$(BIN)/python -m tests.ha.failover --seed $(SEED) --runs $(RUNS) $(ARGS)

.PHONY: format
format: $(MADE_DEV) ## let ruff put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: lock
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url
lock: $(MADE) ## compile both lock files anew from pyproject.toml
	$(PIP) uv
	$(COMPILE) --group install pyproject.toml -o requirements.lock
	$(COMPILE) --group dev -c requirements.lock pyproject.toml -o requirements-dev.lock

.PHONY: clean
clean: ## remove what make and the tools made (.venv, caches, dist); the data in .fairdrop stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find app tests loadtest migrations -name __pycache__ -type d -prune -exec rm -rf {} +
