# `make demo` and `make test` need only Python >= 3.10 and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
WORK ?= benchmarks/work

.PHONY: help demo test lint types unit bench experiments wheel clean

help:
	@echo "make demo   compress a real pretrained transformer 19 times and measure the result"
	@echo "make test   lint, types and the whole test suite"
	@echo "make bench  run the benchmarks that have no result yet, and print the tables"
	@echo "make experiments DATA=FOLDER WORK=FOLDER   distill on plain text and on tasks; takes days, goes on where it was"
	@echo "make wheel  build dist/*.whl;  make clean  remove what the others made"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "compresskit needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/compresskit demo

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks run compress
	$(BIN)/python -m benchmarks run minilm
	$(BIN)/python -m benchmarks report

# In order of value; what has a result is left out, so the same command goes on after an interruption.
experiments: $(VENV)/.dev
	$(BIN)/python -m benchmarks run corpus-distill --only 'short-*' --data $(DATA) --work $(WORK)
	$(BIN)/python -m benchmarks run corpus-distill --only 'long-encoder-*' --data $(DATA) --work $(WORK)
	$(BIN)/python -m benchmarks run recipe --only 'two-7.7-*' --data $(DATA) --work $(WORK)
	$(BIN)/python -m benchmarks run corpus-distill --data $(DATA) --work $(WORK)
	$(BIN)/python -m benchmarks run recipe --data $(DATA) --work $(WORK)
	$(BIN)/python -m benchmarks report

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
