# make demo   a first aligned model: installs into .venv and trains twelve rounds of configs/quickstart.yaml
# make test   the tests in minutes (test-promises, test-slow: the longer ones); make lint: style, types
# make help   lists the rest
#
# uv installs, several times as fast as pip; pip does where uv cannot be had or does not succeed. Where packages come from (index,
# proxy, certificates) is their own business: set pip's environment variables or pip.conf, or uv's. An index that pip is given
# is given to uv too. PIP=1 leaves uv out.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
# of another run file, its own number of rounds
ROUNDS ?= $(if $(filter configs/quickstart.yaml,$(CONFIG)),12)

.DEFAULT_GOAL := help
.PHONY: help demo install install-dev test test-promises test-slow chaos docs docs-check lint format bench clean distclean

help:
	@echo "make demo       install into $(VENV) and train $(CONFIG) (four minutes on two CPU cores)"
	@echo "make test       the default tests (five minutes on two cores)"
	@echo "make test-promises  local = Ray = killed = resumed, whole runs on both (a quarter of an hour)"
	@echo "make test-slow  the long tests"
	@echo "make chaos      thirty kills and four drained nodes in one run, another under an autoscaler (a quarter of an hour)"
	@echo "make docs-check run every command that docs/cluster.md and docs/rewards.md show"
	@echo "make docs       build the site with the reference into build/docs (a warning is an error)"
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

# $(call install,WHAT,UV_OPTIONS): installs WHAT with the pinned versions.
define install
	@set -e; python=$(BIN)/python; pip="$$python -m pip install --disable-pip-version-check -c constraints.txt"; \
	index=$${PIP_INDEX_URL:-$$($$python -m pip config get global.index-url 2>/dev/null || true)}; \
	if [ -n "$$index" ] && [ -z "$$UV_DEFAULT_INDEX" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	if [ -z "$(PIP)" ] && $$pip --quiet uv && (set -x; $(BIN)/uv pip install --python $$python -c constraints.txt $(2) $(1)); \
	then exit 0; fi; \
	set -x; $$pip $(1)
endef

# A run starts some ten processes at once, the tests a hundred: what they import is compiled once, here. For a run it is some
# packages without their tests and without the hundreds of models that no policy here is; that takes less than half the time.
IMPORTED := accelerate diffusers huggingface_hub matplotlib mpmath numpy pandas peft pydantic ray scipy sympy torch torchvision transformers
UNUSED := /(tests?|testing)/|transformers/models/(?!auto/|clip/|__)|diffusers/pipelines/(?!stable_diffusion/|\w*\.py)|ray/(rllib|serve|llm|tune)/
define compile
	@echo "compiling what a run imports"
	@cd $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && { \
	  $(abspath $(BIN)/python) -m compileall -q -j 0 -x '$(UNUSED)' $(IMPORTED) & \
	  while kill -0 $$! 2>/dev/null; do printf .; sleep 2; done; echo; } || true
endef

# Stamps: what is installed is renewed when, and only when, what it was installed from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e .)
	$(compile)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e '.[dev]',--compile-bytecode)
	@touch $(VENV)/.installed $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# A demo that was run before is kept: the next one goes to runs/quickstart-2, -3 and so on.
demo: $(VENV)/.installed
	@out=runs/quickstart; n=1; \
	while [ -e "$$out" ]; do n=$$((n + 1)); out=runs/quickstart-$$n; done; \
	(set -x; $(BIN)/rlalign train $(CONFIG) $(if $(ROUNDS),rounds=$(ROUNDS)) --out "$$out") && \
	echo "next:   $(BIN)/rlalign train --resume $$out rounds=40   (goes on from here; docs/rewards.md: other rewards)"

# A file goes whole to one process, in the order of tests/conftest.py. Those that need a Ray wait more than they compute: they go
# to one process (tests/whole_files.py), beside as many as there are cores, four at most. Whole runs have a Ray in every process,
# which gives a node 30 s to start: there are as many processes as cores.
# What the processes compile, each other one finds, also where the environment says not to write it.
unexport PYTHONDONTWRITEBYTECODE
CORES := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
SIDE_BY_SIDE := --dist loadfile --no-loadscope-reorder --max-worker-restart 4

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $$(($(CORES) + 1)) $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-promises: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "promise and not slow" -n $(CORES) $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow or promise" --timeout 3600 $(PYTEST_ARGS)

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow tests/end_to_end/test_chaos.py tests/end_to_end/test_autoscaler.py

docs-check: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow -s tests/docs

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e '.[docs]')
	@touch $(VENV)/.installed $@

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "site: build/docs/index.html"

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
