# The two commands to know: make demo, make test.
PYTHON ?= python3
VENV   ?= .venv
# Test processes at once.
JOBS   ?= 2
BIN    := $(VENV)/bin
# Files in their order: the slow ones are not among the last.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder

.PHONY: help setup tools demo up test test-matrix prove-image chaos check format clean

help:
	@echo "make demo    set up, then train a small LLaMA with GaLore through the whole service (about 2 minutes)"
	@echo "make up      set up, then run the service on this machine until Ctrl-C"
	@echo "make test    set up, then run all tests (real Valkey, real PostgreSQL, both started by the tests)"
	@echo "make test-matrix  set up, then all tests with every combination of docs/zero.md, and write its tables (about an hour)"
	@echo "make chaos   set up, then break the service at random under SEEDS on both databases, and judge it (about 20 minutes)"
	@echo "make prove-image  set up, then build the Dockerfile's CPU images without an engine, and run what they are for (as root)"
	@echo "make check   set up, then ruff, mypy and the import contracts"
	@echo "make format  let ruff rewrite what it can"

setup: $(VENV)/installed

# A virtual environment with pinned dependencies; made again when they change.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Stiefel needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/stiefel demo

up: setup
	$(BIN)/stiefel up

test: setup tools
	$(PYTEST)

# Helm 3 and 4, which are in no Python environment by themselves; without them the tests that ask them are skipped.
tools: setup
	$(BIN)/python -m tests.deploy.tools

# Needs root, and Debian's buildah and debootstrap.
prove-image: setup
	$(BIN)/python -m tests.deploy.prove_image

# One line a case; the tables are made of them.
MATRIX := .stiefel/matrix.jsonl

test-matrix: setup tools
	@mkdir -p $(dir $(MATRIX)) && rm -f $(MATRIX)
	STIEFEL_MATRIX_RESULTS=$(abspath $(MATRIX)) $(PYTEST) -m 'matrix or not matrix'; status=$$?; \
	$(BIN)/python -m tests.distributed.report $(MATRIX) && exit $$status

# Seconds of faults in each campaign, and one campaign for each seed and database.
SECONDS := 120
SEEDS   := 1 2 3

chaos: setup
	@mkdir -p .stiefel; status=0; for database in sqlite postgresql; do \
	$(BIN)/python -m tests.chaos --seed $(SEEDS) --seconds $(SECONDS) --database $$database \
		--report .stiefel/chaos-$$database.md || status=1; done; exit $$status

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .stiefel build dist *.egg-info
