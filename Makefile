# `make help` lists the targets. Everything is installed into .venv, nothing outside it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Any torch from 2.10 on; this release is small on PyPI's CPU mirrors. Override: make dev TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
# A second torch, on which the library that was built against the first one must run unchanged.
SECOND_TORCH ?= torch==2.14.1
PYTEST_ARGS ?=
JOBS ?= $(shell nproc)
K ?=
OP ?=
PIP_INSTALL := $(BIN)/pip install -q --disable-pip-version-check
BUILD := $(PIP_INSTALL) --no-build-isolation
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help demo test dev lint format emulator emulate cubins mutations sanitize fuzz soak second-torch bench gpu accuracy clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.build-requirements:
	@command -v $(PYTHON) >/dev/null || { echo "gemma2 needs Python 3.10 or newer: install it or say make PYTHON=..." >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "gemma2 needs a C++20 compiler, such as g++ 11: install one or set CXX" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH) numpy "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.26" ninja
	@touch $@

demo: $(VENV)/.build-requirements  ## Install, then write definitions and classify glosses with the embedded model
	$(BUILD) .
	@echo
	$(BIN)/gemma2 info
	@echo
	$(BIN)/gemma2 generate --stats "a small bird"
	@echo
	$(BIN)/gemma2 generate --stats "to run quickly"
	@echo
	$(BIN)/gemma2 classify "a large wild cat with stripes"
	@echo
	$(BIN)/gemma2 classify "move very fast on foot"

dev: $(VENV)/.build-requirements  ## An editable build: Python files are live, C++ is rebuilt by the next `make dev`
	flock $(VENV)/.build-lock $(BUILD) -e .

$(VENV)/.test-requirements: $(VENV)/.build-requirements
	$(PIP_INSTALL) "pytest>=8" "pytest-xdist>=3.5" "hypothesis>=6.100" expecttest "transformers>=4.57,<5" "scikit-learn>=1.3" "sentencepiece>=0.2" "gguf>=0.10" "orbax-checkpoint>=0.6" "peft>=0.13" "psutil>=5.9" "nvidia-cuda-nvdisasm>=13.2; platform_system == 'Linux'"
	$(PIP_INSTALL) --target $(VENV)/transformers5 --upgrade "transformers>=5.3,<6"
	@touch $@

# A process per core with a thread each: the tests' tensors are small. What threads may change is tested
# with several, whatever OMP_NUM_THREADS says.
# tests/cuda is `make emulate` and `make cubins`.
test: $(VENV)/.test-requirements dev  ## All tests but those of CUDA; PYTEST_ARGS="-k window -x" for some
	OMP_NUM_THREADS=1 GEMMA2_TEST_TRANSFORMERS5=$(abspath $(VENV))/transformers5 \
		$(BIN)/python -m pytest -n $(JOBS) --ignore tests/cuda $(PYTEST_ARGS)

CXX_FILES := '*.cpp' '*.h' '*.cu'
lint: $(VENV)/.test-requirements  ## ruff, mypy, clang-format
	$(PIP_INSTALL) ruff==0.17.6 mypy==2.4.1 clang-format==19.1.7
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files $(CXX_FILES))

format:  ## Rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CXX_FILES))

emulator: $(VENV)/.test-requirements  ## Build the CUDA kernels as host code, with the emulator that checks them
	$(BIN)/python -m tests.cuda.emulation

# Without K: the tests of the emulator itself (`make cubins` and `make mutations` have others of
# tests/cuda), the operators' contract tests and the users' cases on emulated CUDA kernels, and the table
# of their counters.
EMULATED := embed rms_norm rope cache_write geglu softcap sample attention linear
# Too long on the emulator: what float32 (dtype0) takes, which no tensor core serves (with K=attention it
# runs), and 8000 tokens.
TOO_LONG := not ((deterministic_bits or small_and or decode_matches) and dtype0) and not 8k_of_context
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)
emulate: emulator dev  ## CUDA kernels on the emulator; K=rms_norm for one operator's tests and counters
	$(if $(K),,$(PYTEST) tests/cuda $(foreach part,static gpu_day mutations mutations_attention,--ignore tests/cuda/test_$(part).py))
	$(PYTEST) -p tests.cuda.backend $(foreach op,$(or $(K),$(EMULATED)),tests/ops/test_$(op).py) \
		$(if $(K),,tests/test_users.py -k "$(TOO_LONG)")
	$(BIN)/python -m tests.cuda.counters $(K)

cubins: $(VENV)/.test-requirements dev  ## Registers, spills, occupancy and instructions of the CUDA binaries
	$(PYTEST) tests/cuda/test_static.py tests/cuda/test_gpu_day.py tests/build/test_cuda_library.py
	$(BIN)/python -m tests.cuda.static

mutations: emulator dev  ## Break the model on purpose, one way at a time, and see the tests fail
	$(BIN)/python -m tests.mutations
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cuda.barriers

sanitize: $(VENV)/.test-requirements dev  ## CPU operators under AddressSanitizer and UBSan, fuzzed
	$(BIN)/python -m tests.sanitize

CASES ?= 10000
fuzz: $(VENV)/.test-requirements dev  ## Damaged model folders of every format; CASES=200000 for a long campaign
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(CASES)

MINUTES ?= 60
soak: $(VENV)/.test-requirements dev  ## Random use of long-lived caches for an hour, each step checked; MINUTES=5 for less
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES)

second-torch: dev  ## Run the operator tests of this build on another torch
	$(BIN)/python -m tests.build.second_torch --torch "$(SECOND_TORCH)" --venv $(VENV)-second

bench: $(VENV)/.test-requirements dev  ## Benchmarks against peers; OP=attention for one
	$(BIN)/python -m benchmarks.runner $(OP)

# Without the virtual environment and without a network: the Python that has torch for CUDA.
PART ?=
GPU_ARGS ?=
gpu:  ## Tests, sanitizers and benchmarks on a GPU; PART=tests, sanitize or bench for one
	$(PYTHON) -m tests.cuda.gpu_day $(addprefix --part ,$(PART)) $(GPU_ARGS)

accuracy: $(VENV)/.test-requirements dev  ## Our error and transformers' against float64, as a table
	$(BIN)/python -m benchmarks.accuracy

clean:  ## Remove builds and caches, keep .venv
	rm -rf build dist gemma2/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
