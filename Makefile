# `make demo` and `make test` need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-faults mutants test-interop test-vllm lint package bench clean

demo: $(VENV)/.runs
	$(BIN)/fastcache demo

# A file of tests is one process's: files share fixtures. One thread each, or they wait for each other.
test: $(VENV)/.develops
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-faults: $(VENV)/.develops
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long or not long" tests/test_kills.py tests/test_commits.py \
		tests/test_full_disks.py tests/test_faults.py tests/test_bits.py tests/test_attacks.py tests/test_verify.py \
		tests/test_resume.py tests/test_reproducible.py tests/test_add_layer.py tests/test_plan.py tests/test_sweep.py

# Changes a module one thing at a time and lists what no test notices: make mutants MODULE=fastcache/files.py
mutants: $(VENV)/.develops
	$(BIN)/python tools/mutate.py $(MODULE)

# SAELens and dictionary-learning want other packages than we do: they get an environment of their own.
test-interop: $(INTEROP)/.develops
	$(INTEROP)/bin/python -m pytest -W default tests/with_saelens

test-vllm: $(VENV)-vllm/.develops
	$(VENV)-vllm/bin/python -m pytest tests/with_vllm

lint: $(VENV)/.develops
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

package: $(VENV)/.develops
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python tools/check_wheel.py dist/*.whl

bench: $(VENV)/.develops
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(INTEROP) $(VENV)-vllm dist build fastcache-runs

# torch goes first and by its exact version: anything else pulls gigabytes of CUDA on a CPU machine.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fastcache needs Python 3.11 or newer: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.runs: $(VENV)/.torch pyproject.toml
	$(PIP) $(TORCH) --editable '.[report]'
	touch $@

$(VENV)/.develops: $(VENV)/.torch pyproject.toml
	$(PIP) $(TORCH) --editable '.[dev]'
	touch $@ $(VENV)/.runs

$(INTEROP)/.develops: constraints-interop.txt pyproject.toml
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-interop.txt $(TORCH)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-interop.txt $(TORCH) \
		--editable . sae-lens pytest pytest-timeout hypothesis einops
	# without its dependencies, most of which are for models: the tests need its trainers only
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0
	touch $@

# vLLM pins its own versions of much that we use too, so that its tests have an environment of their own.
$(VENV)-vllm/.develops: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
