# Every target makes its own environment, .venv (compile-check: .venv-compile,
# bench-llama: .venv-llama), when there is none or when it is not the one that
# setup.py and constraints.txt describe.

FOLDER := .venv
# What it was made with, unless other things are named.
-include $(FOLDER)/made-with.mk
PYTHON ?= python3
EXTRAS ?= test
ARGS ?=
CONFIG ?= configs/pquant.py:tiny
# configs/pquant.py:tiny -> runs/pquant-tiny
WORKDIR ?= runs/$(subst :,-,$(subst .py,,$(notdir $(CONFIG))))

# What compiling llama.cpp needs.
TOOLS := $(if $(findstring llama,$(EXTRAS)),cmake ninja scikit-build-core)
VENV := $(FOLDER)/bin/python
# The stamp's name says what the environment was made from; the checkout's path
# is part of it, because an editable install points there.
INPUTS := $(shell { $(PYTHON) -VV; echo '$(CURDIR) $(EXTRAS)'; \
  cat setup.py constraints.txt pallas_kernels/native/*.cc \
  pallas_kernels/native/*.h; } | cksum | cut -d ' ' -f 1)
STAMP := $(FOLDER)/made-from-$(INPUTS)

.DEFAULT_GOAL := help
.PHONY: help train test test-all check format bench bench-llama compile-check \
  constraints clean

help:  ## This list.
	@echo 'make TARGET [PYTHON=python3.12] [EXTRAS=test,gpu] [ARGS=...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' \
	  Makefile

train: $(STAMP)  ## Pretrain; CONFIG=configs/<method>.py:<size>, WORKDIR=<folder>.
	$(VENV) -m qat.main --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test: $(STAMP)  ## Run the fast tests.
	$(VENV) -m pytest -n auto --dist loadfile -m 'not slow' $(ARGS)

test-all: $(STAMP)  ## Run all tests.
	$(VENV) -m pytest $(ARGS)

check: $(STAMP)  ## Lint, and look whether everything is formatted.
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check

format: $(STAMP)  ## Mend what the linter can mend, and format.
	$(VENV) -m ruff check --fix
	$(VENV) -m ruff format

bench: $(STAMP)  ## Measure a training step.
	$(VENV) scripts/bench.py train $(ARGS)

bench-llama:  ## Measure decoding beside llama.cpp's, which is compiled first.
	$(MAKE) FOLDER=.venv-llama EXTRAS=llama measured-llama

.PHONY: measured-llama
measured-llama: $(STAMP)
	$(VENV) scripts/bench.py decode --llama $(ARGS)

# Kernels are compiled for each kind; steps of pQuant, 1.3B, for the large ones.
KINDS := v5e:2x2,v5p:2x2x1,v6e:2x2,tpu7x:2x2x1,h200
LARGE := --target=v5p:2x2x1,h200 --config=configs/pquant.py:1.3b
CHECKS := checked-kernels checked-step checked-decode

compile-check:  ## Compile kernels and steps for TPUs and GPUs, without any.
	$(MAKE) --keep-going FOLDER=.venv-compile EXTRAS=tpu,gpu $(CHECKS)

.PHONY: $(CHECKS)
checked-kernels: $(STAMP)
	$(VENV) scripts/compile_check.py --what=kernels --target=$(KINDS) --limit=600
checked-step: $(STAMP)
	$(VENV) scripts/compile_check.py $(LARGE) --config.data.batch_size=16
checked-decode: $(STAMP)
	$(VENV) scripts/compile_check.py --what=decode $(LARGE) \
	  --config.data.batch_size=1

constraints: python-is-new-enough  ## Renew constraints.txt; use the oldest Python.
	$(PYTHON) -m venv --clear .venv
	$(VENV) -m pip install --quiet --upgrade setuptools jaxlib
	$(VENV) -m pip install --quiet --no-build-isolation --editable '.[test,hf]'
	{ grep '^#' constraints.txt; $(VENV) -m pip freeze --all --exclude pip \
	  --exclude qat; } > .venv/constraints.txt
	mv .venv/constraints.txt constraints.txt

clean:  ## Remove the environment and caches; never runs or data.
	rm -rf .venv .venv-compile .venv-llama build dist *.egg-info \
	  .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# setuptools comes first: what venv brings is too old for setup.py; and jaxlib,
# whose headers the C++ extension includes.
$(STAMP): | python-is-new-enough
	$(PYTHON) -m venv --clear $(FOLDER)
	$(VENV) -m pip install --quiet --constraint=constraints.txt \
	  setuptools jaxlib $(TOOLS)
	$(VENV) -m pip install --quiet --constraint=constraints.txt \
	  --no-build-isolation --editable '.[$(EXTRAS)]'
	printf '%s ?= %s\n' PYTHON '$(PYTHON)' EXTRAS '$(EXTRAS)' \
	  > $(FOLDER)/made-with.mk
	touch $@

.PHONY: python-is-new-enough
python-is-new-enough:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "qat needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
