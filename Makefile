# make quickstart   set up, then train a tiny model with GRPO and with SGPO (a few minutes on a laptop CPU)
# make test         set up, then lint, type check and the fast tests, one training of every treatment among them (minutes)
# make test-all     set up, then the slow tests: trainings, processes, whole commands, recorded results
# make test-engine  an environment with vLLM for CPUs in .venv-engine, then the tests against a real vLLM: not among the others
# make docs         set up, then the documentation site, in site/
# make setup        the environment in .venv, from pyproject.toml and constraints.txt

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup quickstart test test-all engine test-engine docs lint clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: setup
	$(BIN)/python recipes/quickstart/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One worker for each of two cores, one torch thread for each worker
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: lint
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST) -m slow

# vLLM pins its own torch and transformers. tests/engine/requirements.txt is complete, so nothing is resolved. Bytecode
# is written when a module is imported: most never are
engine: .venv-engine/.installed

.venv-engine/.installed: tests/engine/requirements.txt tests/engine/name_vllm.py pyproject.toml
	$(PYTHON) -m venv .venv-engine
	.venv-engine/bin/python -m pip install --quiet --no-deps --no-compile --requirement tests/engine/requirements.txt
	.venv-engine/bin/python -m pip install --quiet --no-deps --editable .
	.venv-engine/bin/python tests/engine/name_vllm.py
	touch $@

# The timeout is for a busy machine
test-engine: engine
	OMP_NUM_THREADS=1 .venv-engine/bin/python -m pytest tests/engine --timeout 1800

# The extra is for this target alone; ruff, which formats the signatures, is there already
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
