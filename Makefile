# Every target does its own set-up in $(VENV); the stamp makes the second time cost nothing.
PYTHON ?= python3
VENV ?= .venv
# Two workers suit the smallest machine we test on; `make test WORKERS=0` runs in one process.
WORKERS ?= 2
INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

.PHONY: demo test test-slow bench bench-device format help clean

help:
	@echo "make demo       fit a mixed-effect hidden Markov model to simulated animals (about a minute)"
	@echo "make test       format, lint, types, tests and doctests"
	@echo "make test-slow  the slow recovery studies as well"
	@echo "make bench      speed beside Pyro and others"
	@echo "make bench-device  speed on a CUDA device"
	@echo "make format     rewrite the sources in house format"

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[dev]"
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(INSTALL) --editable ".[bench]"
	@touch $@

demo: $(STAMP)
	@mkdir -p out
	$(VENV)/bin/python examples/mixed_hmm.py --plot out/mixed_hmm.png

test: $(STAMP)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS)

bench: $(BENCH_STAMP)
	$(VENV)/bin/python -m benchmarks

bench-device: $(BENCH_STAMP)
	$(VENV)/bin/python -m benchmarks.device

format: $(STAMP)
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
