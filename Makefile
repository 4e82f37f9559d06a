# Everything runs in .venv, which is made on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev

# The lowest versions that are promised, in an environment of their own.
LOWEST_PYTHON ?= python3.10
LOWEST := .venv-lowest
LOWEST_READY := $(LOWEST)/.ready

SETTINGS := OMP_NUM_THREADS=1
TESTS := -m pytest -n 2

.PHONY: demo test test-all test-lowest lint types bench bench-all gpu docs clean

demo: $(DEMO)
	$(BIN)/i2am demo --out i2am-demo

test: $(DEV)
	$(SETTINGS) $(BIN)/python $(TESTS) -m "not slow"

test-all: $(DEV)
	$(SETTINGS) $(BIN)/python $(TESTS)

test-lowest: $(LOWEST_READY)
	$(SETTINGS) $(LOWEST)/bin/python $(TESTS) -m "not slow"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

bench bench-all: $(DEV)
	mkdir -p results
	$(BIN)/python -m pytest benchmarks $(if $(filter bench,$@),-m 'not slow') -o python_files='bench_*.py' --benchmark-json=results/bench.json
	$(BIN)/python -m benchmarks.report results/bench.json

gpu: $(DEV)
	$(BIN)/python -m benchmarks.gpu

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What the demo needs, step by step, and then what tests, benchmarks and documentation need besides.
$(DEMO): pyproject.toml setup.py constraints.txt
	@test -x $(BIN)/python || { echo "1/4  a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "2/4  PyTorch (on Linux the package index serves its CUDA build: about 3 GB, a few minutes)"
	@$(PIP) setuptools torch numpy
	@echo "3/4  diffusers, transformers, SciPy, matplotlib, scikit-image (its photographs): about 200 MB"
	@$(PIP) diffusers transformers scipy matplotlib scikit-image
	@echo "4/4  i2am itself, from this folder"
	@$(PIP) --editable ".[demo]"
	@touch $@

$(DEV): $(DEMO)
	@echo "adding what tests, benchmarks and documentation need"
	@$(PIP) --editable ".[dev]"
	@touch $@

$(LOWEST_READY): pyproject.toml setup.py constraints-lowest.txt
	@echo "the lowest promised versions in $(LOWEST), on $(LOWEST_PYTHON): about 6 GB"
	@test -x $(LOWEST)/bin/python || $(LOWEST_PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-lowest.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks results i2am-compare i2am-demo i2am-trace
