# Everything runs in .venv, which is made on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench bench-all docs clean

demo: $(READY)
	$(BIN)/i2am demo --out i2am-demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench bench-all: $(READY)
	mkdir -p results
	$(BIN)/python -m pytest benchmarks $(if $(filter bench,$@),-m 'not slow') -o python_files='bench_*.py' --benchmark-json=results/bench.json
	$(BIN)/python -m benchmarks.static --arch sm_80,sm_90 > results/static.txt
	$(BIN)/python -m benchmarks.report results/bench.json --static results/static.txt

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks results i2am-compare i2am-demo i2am-trace
