# Each target sets up everything that it needs: only make and Python 3.10 to 3.14 must be there.
#   make demo    German text -> tokenizer -> training, killed and resumed -> Hugging Face model, with proofs, on the CPU
#   make test    the tests that this machine can run, on all its cores
#   make test-fast   for while you write: no slow test, no test of several processes, no GPU
#   make test-slow   the long ones: hundreds of kills, long fuzzing
#   make check   ruff, formatting, mypy, layers and repository rules
#   make docs    the documentation site, in site/, with warnings as errors
#   make format  puts the code into ruff's form
# PYTHON=python3.12 picks the interpreter that makes the environment.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n auto --no-loadscope-reorder

.PHONY: setup demo test test-fast test-slow check docs format

setup: .venv/ready

# ready is younger than what it was made from: a change of the dependencies is installed by the next target.
.venv/ready: setup.py requirements.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 15) else "Python 3.10 to 3.14 is needed, this is %d.%d; make PYTHON=... picks another" % v)'
	@$(PYTHON) -m venv .venv || { echo "python -m venv failed: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv: some 120 packages, a minute or more; pip names each as it comes"
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off --constraint constraints-cpu.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py

test: setup
	$(PYTEST) --timeout 600

test-fast: setup
	$(PYTEST) --timeout 60 -m "not distributed and not gpu and not slow and not long"

test-slow: setup
	$(PYTEST) -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py tests/test_repository.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
