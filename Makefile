# Everything starts here: `make` lists the commands. Each sets up the environment it needs, once.
# VENV=DIR uses an environment elsewhere; PY=PYTHON on the command line uses that interpreter as it is, no set-up.
VENV ?= .venv
override VENV := $(patsubst ~/%,$(HOME)/%,$(VENV))
PY = $(VENV)/bin/python
TESTS ?= tests
MARKERS ?= not gpu and not slow
JOBS ?= 3
IMAGE ?= elastic

export VENV
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export TOKENIZERS_PARALLELISM := false
ifeq ($(wildcard /dev/nvidia0),)
export TORCHDYNAMO_DISABLE := 1
endif
smoke smoke-chat check test test-engines gpu: export HF_HUB_OFFLINE := 1
check test test-engines: export OMP_NUM_THREADS := 1
# Empty is unset: else each of the many processes that tests start would compile the project's files anew.
check test test-engines: export PYTHONDONTWRITEBYTECODE :=
benchmark gpu: export PYTHONWARNINGS := ignore
benchmark gpu: export KINETO_LOG_LEVEL := 99

.PHONY: help setup smoke smoke-chat check test test-engines lint benchmark gpu docker clean
.DEFAULT_GOAL := help

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  make engine-mlx, engine-vllm, engine-llama_cpp: an environment for an engine that runs exports (docs/serving.md)"
	@echo
	@echo "  VENV=DIR      use or make the environment DIR, to share 5 GB between clones (default .venv)"
	@echo "  PYTHON=FILE   make the environment with this Python 3.12 or 3.13 (default: the first that runs)"
	@echo "  PY=FILE       run with this interpreter as it is and set up nothing (containers)"
	@echo "  TESTS=PATH    test only this (default tests); MARKERS=EXPR picks by marker (default '$(MARKERS)')"
	@echo "  JOBS=N        test files at a time (default $(JOBS), for check 2); many start processes of their own"

setup: ## make the environment, if it is not up to date
ifneq ($(origin PY),command line)
	@bash launch/bootstrap.sh
endif

smoke: setup ## train one nested family on real text and export it: runs/smoke/summary.json
	"$(PY)" recipes/smoke.py

smoke-chat: setup ## train a family on made-up conversations and count right answers: runs/smoke_chat/summary.json
	"$(PY)" recipes/smoke_chat.py

# A file is one worker's, since its tests share runs. In the order of their folders those that take longest (a Slurm,
# torchrun, many processes) come first, so that no worker is left alone with them at the end.
PYTEST = "$(PY)" -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(MARKERS)"

check: JOBS = 2
check: setup ## run the quick tests: units, and parity with stock models
	$(PYTEST) tests/parity tests/unit

test: setup engine-mlx ## run the tests that need no GPU
	$(PYTEST) $(TESTS)

# An environment for an engine that runs exports, beside this one: what `extract export.check=[NAME]` uses.
engine-%: setup
ifneq ($(origin PY),command line)
	@launch/engine.sh $*
endif

test-engines: engine-mlx engine-vllm engine-llama_cpp ## run exports in the engines (llama.cpp is compiled: ten minutes)
	"$(PY)" -m pytest tests/programs/test_engines.py tests/parity/test_gguf.py

lint: setup ## check style (ruff), the house's rules, types (mypy) and, where it is installed, shell scripts (shellcheck)
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m pytest -q tests/unit/test_import_direction.py tests/unit/test_repository.py
	"$(PY)" -m mypy elastic recipes
ifneq ($(shell command -v shellcheck),)
	shellcheck -x .ci/run $(wildcard launch/*.sh tests/*/*.sh)
endif

benchmark: setup ## measure the ratios that docs/speed.md states
	"$(PY)" recipes/benchmark.py

# Without the plugins of `make setup`: a machine with a GPU may have none of it. Tests first, which end in time.
GPU_SECONDS ?= 480
GPU_JSON ?= runs/gpu.json
gpu: setup ## test and measure on this machine's GPU, in $(GPU_SECONDS) s: GPU_SECONDS=N, GPU_JSON=FILE (runs/gpu.json)
	@started=$$(date +%s); tests=0; \
	"$(PY)" -m pytest -p no:cacheprovider --seconds $$(($(GPU_SECONDS) / 2)) tests/unit/kernels tests/gpu || tests=$$?; \
	"$(PY)" recipes/benchmark.py --only gpu --json "$(GPU_JSON)" \
		--seconds $$(($(GPU_SECONDS) - 30 - $$(date +%s) + started)) && exit $$tests

docker: ## build the container image (IMAGE=elastic; BASE_IMAGE=... for another base)
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --tag $(IMAGE) .

clean: ## remove caches and build products; never runs/, data/ or the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find elastic recipes tests launch -name __pycache__ -type d -prune -exec rm -rf {} +
