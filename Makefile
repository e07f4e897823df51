# make quickstart   environment, then sweeps/quickstart.yaml, then where the report is
# make test         environment, then all tests but the slow ones; the Ray tests run whatever the others say
# make check        ruff (lint and format), mypy
# make docs         the generated tables of sweeps/*.md anew, from the code
# make lock         ftsec_ray/stages/versions.lock anew: the code changed, the results did not
# make bench        the figures of tests/benchmarks
# make picture      sweeps/report.png: the top of the report of results/quickstart (needs Chromium)
# make gpu-smoke    what only a GPU can show, in under four minutes; says so where there is none
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-slow check docs lock bench picture gpu-smoke clean

quickstart: $(VENV)/.installed
	$(BIN)/ftsec run sweeps/quickstart.yaml

test: $(VENV)/.installed-dev
	failed=0; \
	$(BIN)/python -m pytest -q -m "not slow and not ray" -n auto --dist loadfile || failed=1; \
	$(BIN)/python -m pytest -q -m "ray and not slow" || failed=1; \
	exit $$failed

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m tests.sweep_reference

lock: $(VENV)/.installed
	$(BIN)/python -m ftsec_ray.code_versions

bench: quickstart $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q -e ".[bench]"
	for f in tests/benchmarks/bench_*.py; do $(BIN)/python -m tests.benchmarks.$$(basename $$f .py) || exit 1; done

PICTURE_OF ?= results/quickstart
PICTURE ?= sweeps/report.png

picture: $(VENV)/.installed-dev
	$(BIN)/python -m tests.report_picture $(PICTURE_OF) $(PICTURE)

gpu-smoke: $(VENV)/.installed-dev
	$(BIN)/python -m tests.gpu_smoke

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
