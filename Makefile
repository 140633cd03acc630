SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# The tests use small matrices: more threads only get in each other's way.
test test-full: export OMP_NUM_THREADS ?= 1

.PHONY: venv demo guide test test-full lint bench clean

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/python examples/demo.py --out out/demo

# The figures of docs/guide.md: make guide GUIDE_OUT=docs/guide GUIDE_DATA=DIR, where DIR holds MNIST/raw; without it they
# are of UCI digits.
GUIDE_OUT ?= out/guide
GUIDE_DATA ?=

guide: venv
	$(BIN)/python examples/guide.py $(if $(GUIDE_DATA),--data-dir $(GUIDE_DATA)) --out $(GUIDE_OUT)

test: venv
	$(BIN)/python -m pytest -q -m "not full" -n 2 --dist loadfile --no-loadscope-reorder

test-full: venv
	mkdir -p out
	SPECOPT_TEST_FULL=1 $(BIN)/python -m pytest -q -ra -n 2 --dist loadfile --no-loadscope-reorder | tee out/test-full.txt

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The recorded figures: make bench BENCH_OUT=benchmarks/results BENCH_DATA=DIR, then python -m benchmarks.reporting.
# BENCH_DATA holds MNIST/raw and cifar-10-batches-bin; without it sigma is followed on UCI digits.
BENCH_OUT ?= out/bench
BENCH_DATA ?=

bench: venv
	$(BIN)/python -m benchmarks.run step --workload mlp --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.run step --workload resnet50 --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.run kernels --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.run traffic --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.run sigma $(if $(BENCH_DATA),--data-dir $(BENCH_DATA)) --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.run comm --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.run caps $(if $(BENCH_DATA),--data-dir $(BENCH_DATA)) --out $(BENCH_OUT)

# Leaves .venv and data/, which take long to get again.
clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kernels specopt examples benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
