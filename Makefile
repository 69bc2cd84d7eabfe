# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A build needs a torch to compile against; this one is small, since it has no CUDA libraries.
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)

.DEFAULT_GOAL := help

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/.build-requirements: $(BIN)/python
	$(BIN)/pip install -q $(TORCH) numpy "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.26" ninja
	@touch $@

dev: $(VENV)/.build-requirements  ## An editable build: Python files are live, C++ is rebuilt by the next `make dev`
	@flock .git/gemma2-build.lock $(BIN)/pip install -q --no-build-isolation --no-deps -e . && $(BIN)/pip install -q $$($(BIN)/python -c "import tomllib; print(*[repr(d) for d in tomllib.load(open('pyproject.toml','rb'))['project']['dependencies'][1:]])" 2>/dev/null || echo safetensors numpy tokenizers tqdm)

.PHONY: help dev
