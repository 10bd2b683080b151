# The verbs of this repository. `make up` and `make test` install everything that they need under .tools and .venv:
# a Python >= 3.11 and make are enough. They use a `uv` on the PATH when there is one.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
UV := $(shell command -v uv || echo .tools/bin/uv)
export UV_PROJECT_ENVIRONMENT ?= .venv

.PHONY: help up cluster test contract chart e2e image lint gen bench eval chaos

help: ## show the verbs
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.tools/bin/uv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.synced: $(UV) pyproject.toml uv.lock
	@$(UV) sync --frozen --all-extras --quiet && touch $@

up: .venv/.synced ## the whole product on this machine: no key, no Docker (UP="--no-model" passes options)
	@.venv/bin/backcast up $(UP)

# Three files at a time: most tests wait, and the tests of a file share servers.
test: .venv/.synced ## unit, chart and integration tests, on real servers (TEST="-k name" passes options)
	@.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TEST)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || printf '\n%s\n' \
	  '*** NOT RUN, for want of Chromium: the console in a browser (tests/browser). `apt-get install chromium` ***' >&2
	@command -v promtool >/dev/null && command -v prometheus >/dev/null || printf '\n%s\n' \
	  "*** NOT RUN, for want of promtool and prometheus (Debian's package prometheus): the tests of alerts, and of dashboards on real metrics. ***" >&2
	@command -v pgbouncer >/dev/null || printf '\n%s\n' \
	  "*** NOT RUN, for want of pgbouncer: the tests behind a pooler. \`apt-get install pgbouncer\` ***" >&2
	@docker info >/dev/null 2>&1 || printf '\n%s\n' \
	  '*** NOT RUN, for want of Docker: the end-to-end tier (tests/e2e, `make e2e`) on a real cluster. ***' >&2

# An environment of its own, with the newest of everything that the bounds in pyproject.toml allow.
PREFECT ?= 3.9.1

contract: .venv/.synced ## tests of what we know of Prefect's insides, on another version (PREFECT=3.9.1 PYTHON=python3.14)
	@$(UV) venv --quiet --clear --python $(PYTHON) .venv-contract
	@$(UV) pip install --quiet --python .venv-contract -e '.[all]' --group dev 'prefect==$(PREFECT)'
	@.venv-contract/bin/python -c 'import platform, prefect; print("Python", platform.python_version(), "Prefect", prefect.__version__)'
	@.venv-contract/bin/python -m pytest $(or $(TEST),tests/integration/test_engine_contract.py)

chart: .venv/.synced ## tests of the Helm chart alone; they need no cluster
	@.venv/bin/python -m pytest tests/chart $(TEST)

e2e: .venv/.synced ## install the chart on a kind cluster, and inject faults (needs Docker; E2E="-k upgrade")
	@.venv/bin/python -m pytest tests/e2e -o log_cli=true -o log_cli_level=INFO \
	  -o log_cli_format='%(asctime)s %(message)s' -o log_cli_date_format='%H:%M:%S' --durations=15 $(E2E)

lint: .venv/.synced ## format, lint, types, import contracts, generated files
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/python -m tests.support.generate --check

gen: .venv/.synced ## write the generated files: docs/openapi.json, settings.md and metrics.md, the chart's schema, README, dashboards
	.venv/bin/python -m tests.support.generate

eval: .venv/.synced ## accuracy of the embedded model, through the HTTP API (EVAL="--model 1.5b")
	.venv/bin/python -m tests.eval $(EVAL)

bench: .venv/.synced ## a first look at speed: submit, end to end, CPU per run
	.venv/bin/python -m tests.bench

chaos: .venv/.synced ## kill, stop and cut off processes under load, then check the runs (CHAOS="--minutes 15 --seed 1")
	.venv/bin/python -m tests.chaos $(CHAOS)

# Builds REGISTRY/<part>:IMAGE_TAG with DOCKER (podman works too); BUILD_ARGS adds options, such as
# "--build-arg PYTHON=python@sha256:…".
DOCKER ?= docker
REGISTRY ?= ghcr.io/backcast
IMAGE_TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGES ?= api worker prefect-server llm

image: $(IMAGES:%=image-%) ## the container images (IMAGES="api worker" builds some, IMAGE_TAG and REGISTRY name them)

image-%:
	DOCKER_BUILDKIT=1 $(DOCKER) build --target $* --tag $(REGISTRY)/$*:$(IMAGE_TAG) --build-arg VERSION=$(IMAGE_TAG) \
	  --build-arg REVISION=$(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null) $(BUILD_ARGS) .

# The cluster of kubectl's current context, else one of kind. NAMESPACE and PORT (on this machine) may be set, HELM adds
# options ("-f mine.yaml"), and a REGISTRY that ends in /backcast is pushed to.
cluster: image ## the whole product on Kubernetes: images built and loaded, chart installed, address and key printed
	@DOCKER="$(DOCKER)" REGISTRY="$(REGISTRY)" IMAGE_TAG="$(IMAGE_TAG)" NAMESPACE="$(or $(NAMESPACE),backcast)" \
	  PORT="$(or $(PORT),8000)" HELM="$(HELM)" charts/cluster

.env: # for compose.yaml: made once, never overwritten
	@umask 077 && { for name in DATABASE POSTGRES PREFECT STORE; do \
	  echo "$${name}_PASSWORD=$$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"; done; printf '%s\n' '' \
	  '# The embedded model. For a provider, remove the next line and fill in the others.' COMPOSE_PROFILES=llm \
	  '#BACKCAST_MODEL__BACKEND=openai' '#BACKCAST_MODEL__BASE_URL=https://api.openai.com/v1' \
	  '#BACKCAST_MODEL__NAME=gpt-4o-mini' '#BACKCAST_MODEL__API_KEY='; } >$@
