# Every target installs what it needs into .venv first, and is quick when that is already there.
# Only Python 3.11 or newer is needed beforehand.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
REPORT ?= runs/demo
# Processes of the tests, one thread each.
JOBS ?= 2

.PHONY: help install demo test lint format types layers unit long slow browser docs docs-blocks examples versions lowest highest clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

# One stamp file for each set of extras: an installation is repeated only when a pin or a dependency changed.
$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing dina-lrm into $(VENV)"
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-base
	@echo "installing the development tools, the server and Ray into $(VENV)"
	$(PIP) -e '.[dev,serve,label,scale]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-base
	@echo "installing the documentation tools into $(VENV)"
	$(PIP) -e '.[docs]'
	@touch $@

install: $(VENV)/.installed-dev  ## the package, editable, with the development tools

demo: $(VENV)/.installed-base  ## generate, train, measure, rank; writes runs/demo/report.html (offline)
	$(BIN)/python -m dina_lrm demo --output $(REPORT)

test: lint types layers unit  ## what a change is tried with: seven minutes on two cores

lint: $(VENV)/.installed-dev  ## ruff: style and formatting; the deployment files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/yamllint --strict deploy
	$(BIN)/kubernetes-validate --strict deploy/kubernetes/*.yaml

format: $(VENV)/.installed-dev  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## pyright: strict on core, standard elsewhere
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/.installed-dev  ## the direction of imports
	$(BIN)/lint-imports

# Tests run side by side, one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=20
SHORT := not slow and not gpu and not browser

unit: $(VENV)/.installed-dev  ## unit and parity tests of less than ten seconds, and the doctests
	$(PYTEST) --dist worksteal -m "$(SHORT) and not long" tests/unit src/dina_lrm tests/parity

long: $(VENV)/.installed-dev  ## the longer ones: training, kills, several processes, servers, Ray, the demo
	$(PYTEST) --dist loadfile -m "$(SHORT) and long" tests/unit tests/trajectory tests/end_to_end

slow: $(VENV)/.installed-dev  ## the tests that take minutes each
	$(BIN)/python -m pytest tests -m slow --durations=20

browser: $(VENV)/.installed-dev  ## report, server page and labelling in headless Chromium, which must be installed
	$(BIN)/python -m pytest tests/browser -m browser

# Not --quiet: it hides the warnings that --strict counts, dead links among them.
docs: $(VENV)/.installed-docs  ## build the documentation into site/, a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The options of pyproject.toml are those of the tests: shapes are not checked here, as they are not for a reader.
docs-blocks: $(VENV)/.installed-dev $(VENV)/.installed-docs  ## run every block of README.md and of the pages under docs/
	$(BIN)/python -m pytest tests/docs
	$(BIN)/python -m pytest -o addopts= -p tests.docs.pages -n $(JOBS) --dist loadfile README.md docs

examples: $(VENV)/.installed-base  ## run every script under examples/
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# What a release needs: the parts that lean on other libraries, with the lowest and the newest versions that pyproject.toml
# allows, each in an environment of its own. Their own deprecation warnings are theirs, and jaxtyping's hook is of one version.
VERSION_TESTS := tests/parity tests/unit/backbones tests/unit/models tests/unit/checkpoints tests/unit/pipelines tests/unit/cli tests/unit/remote
versions: lowest highest  ## the tests of scoring and the command line with the lowest and newest dependencies: 12 GB of disk

lowest highest: $(VENV)/.installed-dev
	$(BIN)/uv venv -q --clear .venv-$@ -p $(BIN)/python
	$(BIN)/uv pip compile -q --resolution $(if $(filter lowest,$@),lowest-direct,highest) pyproject.toml \
		--extra serve --extra label -o .venv-$@/versions.txt
	$(BIN)/uv pip install -q -p .venv-$@/bin/python -r .venv-$@/versions.txt
	$(BIN)/uv pip install -q -p .venv-$@/bin/python -c constraints.txt pytest pytest-xdist beartype
	$(BIN)/uv pip install -q -p .venv-$@/bin/python --no-deps -e .
	grep -v '^ ' .venv-$@/versions.txt
	OMP_NUM_THREADS=1 .venv-$@/bin/python -m pytest -q -n $(JOBS) $(VERSION_TESTS) -m "$(SHORT) and not long" \
		-o addopts="--import-mode=importlib --strict-markers" -o filterwarnings=default

clean:  ## remove what the targets above wrote, the environment included
	rm -rf $(VENV) .venv-lowest .venv-highest runs site .pytest_cache .ruff_cache .import_linter_cache
