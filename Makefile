# Ka: every target brings the checkout up to date first (quick when nothing is to be done).
#
#   make setup   Debian packages and .venv; then .venv/bin/nfsp and the others work from there
#   make demo    a whole nfsp cluster on this machine, with real data, verified, torn down
#   make test    every test;  TESTARGS='-k striping' passes arguments on, JOBS=1 runs them in turn
#   make lint    style and types
#   make bench   the same workloads on nfsp and on its peers;  BENCHARGS passes arguments on
#   make clean   remove what the targets above made in the checkout

BIN := .venv/bin
JOBS ?= 2
TESTARGS ?=
BENCHARGS ?=

.PHONY: help setup demo test lint bench clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@scripts/setup demo

demo: setup
	@$(BIN)/python -m bench.demo

test:
	@scripts/setup test
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder --durations=20 $(TESTARGS)

lint:
	@scripts/setup test
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python -m bench $(BENCHARGS)

clean:
	rm -rf .venv build ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
