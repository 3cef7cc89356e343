# Two commands matter: `make demo` and `make test`. Both prepare .venv when it is missing or stale.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# img2dataset needs imghdr, which Python 3.13 removed: 3.11 or 3.12 it is.
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] < (3,13))' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/
# The stamp's name is what was installed, so a changed pin, extra or interpreter makes it stale.
STAMP := .venv/.installed-$(shell { cat pyproject.toml constraints.txt; $(PYTHON) --version; } 2>&1 | cksum | cut -d' ' -f1)

export HF_HUB_OFFLINE ?= 1
export NO_ALBUMENTATIONS_UPDATE ?= 1

.PHONY: help demo test lint format bench schema lock clean
help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(STAMP) ## the whole job on the embedded synthetic web, in minutes on a laptop
	@$(RUN)capfilt demo $(ARGS)

# tests/jobs waits for processes most of its time, all else computes: side by side they take half as long.
test: lint ## lint, types and tests, as CI runs them; with ARGS, those tests alone
ifdef ARGS
	@$(RUN)python -m pytest $(ARGS)
else
	@echo "==> pytest, of tests/jobs and of all else, side by side"
	@log=$$(mktemp); $(RUN)python -m pytest tests/jobs >$$log 2>&1 & jobs=$$!; status=0; \
		$(RUN)python -m pytest --ignore tests/jobs || status=$$?; \
		wait $$jobs || status=$$?; echo "==> tests/jobs"; cat $$log; rm $$log; exit $$status
endif

lint: $(STAMP) ## ruff (lint and format) and mypy --strict
	@echo "==> ruff"
	@$(RUN)ruff check .
	@$(RUN)ruff format --check .
	@echo "==> mypy --strict"
	@$(RUN)mypy

format: $(STAMP) ## rewrite the code as ruff wants it
	@$(RUN)ruff check --fix .
	@$(RUN)ruff format .

bench: $(STAMP) ## every benchmark beside its peer, and README's table of them
	@$(RUN)python tests/benchmarks/table.py $(ARGS)

schema: $(STAMP) ## write jobs/recipes/recipe.schema.json for editors
	@$(RUN)capfilt schema > jobs/recipes/recipe.schema.json

lock: $(STAMP) ## write the installed versions to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(RUN)pip list --format=freeze --exclude-editable --exclude pip \
		--exclude setuptools --exclude wheel | sed 's/+cpu//'; } > .venv/constraints.new
	@mv .venv/constraints.new constraints.txt

clean: ## remove .venv, caches and the demo's output
	rm -rf .venv capfilt-demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP):
	@test -n "$(PYTHON)" || { echo "capfilt needs Python 3.11 or 3.12 (img2dataset needs imghdr, gone in 3.13);" \
		"none found: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "==> preparing .venv with $$($(PYTHON) --version) (a few minutes the first time)"
	@test -x .venv/bin/python && [ "$$(.venv/bin/python --version)" = "$$($(PYTHON) --version)" ] \
		|| { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@rm -f .venv/.installed-*
	@$(RUN)python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[test]' \
		| sed -u -n -E 's/^(Collecting|Downloading|Installing collected|Successfully).*/  &/p' | cut -c1-100
	@$(RUN)python -m pip check
	@touch $@
