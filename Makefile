# `make` alone prints what there is.

PYTHON ?= python3
ACCELERATORS ?= 2
ARGS ?= --recipe mini_mtil
TESTS ?= tests
# Processes that run tests, one more than cores, for some of them wait; 0: make's own.
WORKERS ?= 3

VENV := .venv
BIN := $(VENV)/bin
# Of pyproject.toml's lower bounds; one for each PYTHON that is given.
OLDEST := .venv-oldest-$(notdir $(PYTHON))

# One thread per rank: the ranks share the cores.
export OMP_NUM_THREADS ?= 1
# Nothing here needs a hub; HF_HUB_OFFLINE=0 lets a recipe fetch weights.
export HF_HUB_OFFLINE ?= 1
# On CPU most of a step can go into page faults of freed and regrown buffers; read when the process starts.
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
# What is compiled at run time is kept per environment: two that share a folder would compile it anew in turns.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# Where it is set, each of the tests' many processes compiles the whole package for itself.
unexport PYTHONDONTWRITEBYTECODE
# torch looks for the ninja program on the PATH when DeepSpeed loads its operation.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup train smoke test test-all test-quick test-oldest lint docs clean

help:
	@echo 'make train      train a recipe: ARGS="--recipe mini_mtil train.lr=5e-3", ACCELERATORS=2 ranks'
	@echo 'make test       the tests, without the long campaigns: TESTS=tests/test_config.py for some of them;'
	@echo '                those of pages need Chromium (apt install chromium), those of clusters SLURM, or are skipped'
	@echo 'make test-all   all tests'
	@echo 'make test-quick the tests that take seconds, without SLURM and the other programs that read shards'
	@echo 'make smoke      two trainings of a minute, which must end above zero-shot'
	@echo 'make test-oldest  test-quick and smoke with the oldest versions allowed: PYTHON=python3.10 for that Python'
	@echo 'make lint       format, rules, spelling and types: what .pre-commit-config.yaml runs before a commit'
	@echo 'make docs       the documentation as pages, in build/docs'
	@echo 'make setup      only make the virtual environment $(VENV) and install the package'
	@echo 'make clean      remove the virtual environments and what builds and tests left; runs/ stays'

train: $(VENV)/.installed
	@command -v numactl >/dev/null || echo 'note: numactl is not installed; nothing here needs it'
	$(BIN)/r1p train --ranks $(ACCELERATORS) $(ARGS)

smoke: $(VENV)/.installed
	$(BIN)/r1p train --ranks $(ACCELERATORS) --recipe mini_mtil_smoke resume=never
	$(BIN)/r1p train --ranks $(ACCELERATORS) --recipe mini_instruct_smoke resume=never
	$(BIN)/python tools/dev/check_smoke.py

# Which tests stay together and in which order they start: tests/conftest.py.
PARALLEL := --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder --durations 20

# Here a missing peer fails the tests that need it; where pytest is called by hand, they are skipped.
test test-all: export R1P_PEERS := 1

test: $(VENV)/.installed-test $(VENV)/.installed-peers $(VENV)/.installed-trackers
	$(BIN)/python -m pytest $(PARALLEL) -m 'not campaign' $(TESTS)

test-all: $(VENV)/.installed-test $(VENV)/.installed-peers $(VENV)/.installed-trackers
	$(BIN)/python -m pytest $(PARALLEL) $(TESTS)

test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not campaign' --ignore tests/slurm $(TESTS)

test-oldest: export PIP_CONSTRAINT := $(CURDIR)/$(OLDEST)/lower_bounds.txt
test-oldest: $(OLDEST)/lower_bounds.txt
	$(MAKE) VENV=$(OLDEST) test-quick smoke

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

# The variable silences the theme's notice about MkDocs 2.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/docs/index.html

setup: $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-oldest-* build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'error: $(PYTHON) is missing or older than 3.10; name another with PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo 'error: $(PYTHON) cannot make virtual environments: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(OLDEST)/lower_bounds.txt: pyproject.toml tools/dev/lower_bounds.py
	@mkdir -p $(OLDEST)
	$(PYTHON) tools/dev/lower_bounds.py > $@

# The second line compiles the one operation that DeepSpeed would otherwise compile in the first run's first minute.
$(VENV)/.installed: pyproject.toml $(VENV)/bin/python
	@command -v g++ >/dev/null \
		|| { echo 'error: g++ is missing, DeepSpeed compiles one operation with it: apt install g++' >&2; exit 1; }
	@echo 'installing into $(VENV), some minutes the first time'
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

# Programs that read our shards and write shards that we read. They want other versions than we do, so they get a
# folder of their own; --no-deps keeps torch out of it.
$(VENV)/.installed-peers: tests/data/peers.txt | $(VENV)/.installed-test
	rm -rf $(VENV)/peers
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/peers --requirement $<
	@touch $@

# DeepSpeed imports these wherever it finds them, which costs every process seconds: they get a folder of their own too.
$(VENV)/.installed-trackers: tests/trackers.txt | $(VENV)/.installed-test
	rm -rf $(VENV)/trackers
	$(BIN)/python -m pip install --quiet --target $(VENV)/trackers --requirement $<
	@touch $@
