# How is this project tried, tested and checked? `make help` lists the targets.
#
# PYTHON is the interpreter everything runs with. A python3 that already has PyTorch, Triton and a GPU is used as it is,
# so that nothing is downloaded on a GPU machine; elsewhere .venv is made with the versions of constraints.txt.
# `make PYTHON=/path/to/python ...` overrides this; that interpreter must have what the target needs.

ifeq ($(origin PYTHON), undefined)
ifeq ($(shell python3 .ci/has_gpu.py && echo yes), yes)
PYTHON := python3
else
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/stamp
endif
endif

# The package is found in src/ by an interpreter in which it is not installed, and by the processes that tests start.
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))

# A thread of PyTorch's that waits gives its core away. Spinning instead, the default, is a quarter faster on a quiet
# machine, and ten times slower or worse where the threads share the cores with any other program.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo docs test lint test-gpu fuzz-gpu sanitize-gpu test-triton audit wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(ENVIRONMENT)  ## train a small language model with a learned attention bias (about a minute)
	@$(PYTHON) examples/relative_bias_lm.py

docs: $(ENVIRONMENT)  ## build the site into build/site
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet
	@echo "build/site/index.html"

test: lint  ## lint, then every test that needs no GPU
	@TRITON_INTERPRET=1 $(PYTHON) -m pytest -q -n auto tests/kernels tests/torch
	@$(PYTHON) -m pytest -q -n auto

lint: $(ENVIRONMENT)  ## formatting, style and types
	@$(PYTHON) -m ruff format --check --quiet .
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m mypy

test-gpu: $(ENVIRONMENT)  ## the tests that need a GPU; they write tests/gpu_report.json
	@$(PYTHON) tests/gpu/precompile.py
	@DEVICE=cuda $(PYTHON) -m pytest tests/gpu tests/integrations -q -n 8 $(if $(COMMIT),--commit $(COMMIT))

fuzz-gpu: $(ENVIRONMENT)  ## random problems against float64: make fuzz-gpu [SECONDS=300] [BACKEND=portable] [SEED=0]
	@$(PYTHON) -m triton_attention.testing.fuzz --backend $(or $(BACKEND),portable) --seconds $(or $(SECONDS),300) \
		--seed $(or $(SEED),0) --workers $(or $(WORKERS),$(shell nproc)) $(if $(PROBLEMS),--problems $(PROBLEMS))

sanitize-gpu: $(ENVIRONMENT)  ## every kernel under compute-sanitizer: make sanitize-gpu [TOOLS="memcheck racecheck"]
	@$(PYTHON) tests/gpu/sanitize.py $(TOOLS)

test-triton: $(ENVIRONMENT)  ## compile every kernel with another Triton: make test-triton VERSION=3.6.0
	@test -n "$(VERSION)" || { echo "Name a version of Triton: make test-triton VERSION=3.6.0"; exit 2; }
	@test -d build/triton-$(VERSION) || \
		$(PYTHON) -m pip install --quiet --no-deps --target build/triton-$(VERSION) triton==$(VERSION)
	@PYTHONPATH=$(CURDIR)/build/triton-$(VERSION):$(PYTHONPATH) $(PYTHON) -m pytest tests/compile -q -n auto

audit:  ## ask pip-audit, and so the network, for known vulnerabilities in the versions of constraints.txt
	@test -x build/audit/bin/pip-audit || { python3 -m venv --clear build/audit && \
		build/audit/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip-audit; }
	@build/audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt

wheel: $(ENVIRONMENT)  ## the wheel of this commit in dist/: the same bytes wherever and whenever it is built
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@git archive HEAD | tar -x -C build/wheel
	@cd build/wheel && umask 022 && chmod -R u=rwX,go=rX . && SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
		$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir ../../dist .
	@cd dist && sha256sum *.whl

clean:  ## remove the environment, builds, caches and what the examples wrote
	@rm -rf .venv build dist examples/output .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/stamp: pyproject.toml constraints.txt
	@echo "Making .venv (PyTorch and the tools: some minutes)"
	@python3 -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench,demo,transformers,docs]'
	@touch $@
