# make demo   a first aligned model: installs into .venv and trains configs/quickstart.yaml
# make test   the tests (make test-slow: the long ones too); make lint: style, types
# make help   lists the rest
#
# Where packages come from (index, proxy, certificates) is pip's own business: set its environment variables or pip.conf.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml

.DEFAULT_GOAL := help
.PHONY: help demo install install-dev test test-slow chaos docs-check lint format bench clean distclean

help:
	@echo "make demo       install into $(VENV) and train $(CONFIG) (a few minutes on two CPU cores)"
	@echo "make test       the default tests"
	@echo "make test-slow  the long tests"
	@echo "make chaos      thirty kills in one run on a small cluster (a few minutes)"
	@echo "make docs-check run every command that docs/cluster.md shows"
	@echo "make lint       ruff check, ruff format --check, pyright"
	@echo "make format     rewrite the code in the house format"
	@echo "make bench      measure speed; prints a table, asserts nothing"
	@echo "make clean      remove caches and build leftovers (distclean: $(VENV) too); runs/ is never touched"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rlalign needs Python 3.11 or newer; '$(PYTHON)' is missing or older." \
	       "Name another with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: what is installed is renewed when, and only when, what it was installed from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# A demo that was run before is kept: the next one goes to runs/quickstart-2, -3 and so on.
demo: $(VENV)/.installed
	@out=runs/quickstart; n=1; \
	while [ -e "$$out" ]; do n=$$((n + 1)); out=runs/quickstart-$$n; done; \
	set -x; $(BIN)/rlalign train $(CONFIG) --out "$$out"

# Files go to the processes in their order: the few long ones, which start a Ray each, lie before the many short ones.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow --timeout 1800 $(PYTEST_ARGS)

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow -s tests/end_to_end/test_chaos.py

docs-check: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow -s tests/docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	@set -e; for file in benchmarks/*.py; do \
	  [ -e "$$file" ] || { echo "no benchmarks here"; break; }; \
	  echo "== $$file"; $(BIN)/python "$$file"; \
	done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rlalign tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
