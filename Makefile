# Two commands do everything: `make demo` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types rules unit torture gpu-test clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[extract,tune,share,dev]'
	touch $@

demo: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/vademecum demo --out runs/demo

test: lint types rules unit

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

rules: $(READY)
	$(BIN)/lint-imports

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/run.py --json torture.json

gpu-test: $(READY)
	$(BIN)/python bench/gpu_test.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
