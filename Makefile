# The verbs of this repository. `make up` and `make test` set up everything they need under .tools and .venv:
# a Python >= 3.11 and make are enough. A `uv` on the PATH is used when there is one.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
UV := $(shell command -v uv || echo .tools/bin/uv)
export UV_PROJECT_ENVIRONMENT ?= .venv

.PHONY: help up test lint gen bench eval chaos

help: ## show the verbs
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.tools/bin/uv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.synced: $(UV) pyproject.toml uv.lock
	@$(UV) sync --frozen --all-extras --quiet && touch $@

up: .venv/.synced ## the whole product on this machine: no key, no Docker (UP="--no-model" passes options)
	@.venv/bin/backcast up $(UP)

test: .venv/.synced ## unit and integration tests, on real servers (TEST="-k name" passes options)
	@.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TEST)  # by files: most tests wait, and share servers

lint: .venv/.synced ## format, lint, types, import contracts, generated files
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/python -m tests.support.generate --check

gen: .venv/.synced ## write the generated files: docs/openapi.json, docs/settings.md
	.venv/bin/python -m tests.support.generate

eval: .venv/.synced ## accuracy of the embedded model, through the HTTP API
	.venv/bin/python -m tests.eval

bench: .venv/.synced ## a first look at speed: submit, end to end, CPU per run
	.venv/bin/python -m tests.bench

chaos: .venv/.synced ## kill, stop and cut off everything under load, then check every run (CHAOS="--minutes 15 --seed 1")
	.venv/bin/python -m tests.chaos $(CHAOS)
