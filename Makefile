# `make` lists what there is. The set-up is done once, into .venv, and again when what it rests on changes.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   ARGS="--tp 2"       passed on to the program of a target
#   TESTS="-k norm"     passed on to pytest
#   OP=softmax          the ops that bench-kernels measures
#   FACTS=folder        tables of measured runs, for plan-check
#   FUZZ_S=600          seconds that fuzz takes for each of its six targets
PYTHON ?= python3
VENV   ?= .venv
TRAIN  ?= --tp 2 --pp 2
RUN    := runs/$(shell date +%Y%m%d-%H%M%S)-$(shell echo $$PPID)
ARGS   ?=
TESTS  ?=
OP     ?=
FUZZ_S ?= 60
FACTS  ?= ../shared/facts
# What a developer runs at each change: fast and broad, under 90 s on two idle cores.
QUICK := tests/repository/test_layering.py tests/repository/test_safe_code.py tests/config tests/plan/test_table.py \
  tests/plan/test_plan.py tests/checkpoint/test_folders.py tests/model/test_gpt.py tests/inventory \
  tests/ops/test_every_op.py::test_values_are_those_of_the_reference_in_float64 \
  tests/train/test_engine.py::test_trains_as_transformers_and_torch_do

# As it is typed, not by $(abspath …), which takes a path with a space for two; all recipes run in this folder.
bin   := $(VENV)/bin
whole := $(if $(filter /%,$(VENV)),,$(CURDIR)/)
ready := $(VENV)/.ready
csrc  := $(wildcard csrc/*)
install := $(bin)/python -m pip install -c constraints.txt

# ninja is found on the PATH.
export PATH := $(whole)$(bin):$(PATH)
# A job killed while it compiled leaves a lock behind: kept here, `rm -r .venv` removes it with the rest.
export TORCH_EXTENSIONS_DIR := $(whole)$(VENV)/torch_extensions
# Without a GPU DeepSpeed warns, at every start, that it had to guess so; telling it saves the reader three lines.
ifeq ($(wildcard /dev/nvidiactl),)
export DS_ACCELERATOR := cpu
endif
# pyright would ask the network whether it is the newest.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train quick test test-slow soak parity plan plan-check bench-data bench-train bench-generate bench-kernels scale-check gpu-check fuzz lint format build clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

train: $(ready) ## Train a small GPT on this machine, 2-way tensor and 2-way pipeline parallel; then let it write
	$(bin)/deepspeed --quiet examples/pretrain_gpt.py $(TRAIN) --save $(RUN) $(ARGS)
	$(bin)/python examples/generate.py --load $(RUN)

quick: $(ready) ## What to run at each change: style, layers, settings, plan, ops, model, training, checkpoints
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/python -m pytest -n 2 --dist loadfile $(QUICK)

test: $(ready) ## Run all tests but the slow ones: 15 minutes or so on two cores
	$(bin)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not slow" $(TESTS)

test-slow: $(ready) ## Run the slow tests: every CUDA source compiled and emulated, launchers, hosts, benchmarks
	$(bin)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m slow $(TESTS)

soak: $(ready) ## Kill training runs 200 times and see that each goes on bit for bit; flip and cut what they left
	$(bin)/python -m tests.soak --json benchmarks/results/soak.json $(ARGS)

parity: $(ready) ## Train 20 steps in every layout and compare losses, gradient norms and weights
	$(bin)/python tools/parity.py $(ARGS)

plan: $(ready) ## Show stages, memory and batch arithmetic of a run without starting it
	$(bin)/python tools/plan.py $(ARGS)

plan-check: $(ready) ## Hold the cost model against measured runs: of FACTS (a folder), or ARGS="--rows FILE"
	$(bin)/python tools/plan_check.py --facts "$(FACTS)" $(ARGS)

bench-data: $(ready) ## Measure preprocessing, beside Megatron-LM's way, and indexing a billion tokens
	$(bin)/python benchmarks/preprocess.py $(ARGS)
	$(bin)/python benchmarks/index.py

bench-train: $(ready) ## Measure training, beside a plain PyTorch GPT-2 doing the same step
	$(bin)/python benchmarks/train.py $(ARGS)

bench-generate: $(ready) ## Measure writing, beside transformers' generate with the same weights
	$(bin)/python -m benchmarks.generate $(ARGS)

bench-kernels: $(ready) ## Measure each fused kernel, or those of OP, beside PyTorch, torch.compile and a copy of its bytes
	$(bin)/python -m benchmarks.kernels $(OP) $(ARGS)

scale-check: $(ready) ## Simulate runs of 4,096 ranks on this machine: each figure with its goal beside it
	$(bin)/python -m benchmarks.scale_check --json benchmarks/results/scale.json $(ARGS)

gpu-check: ## Build, prove, benchmark and train on this machine's GPU, by PYTHON as it is: installs nothing
	@$(PYTHON) -c 'import torch, numpy' || { echo "error: $(PYTHON) lacks torch or numpy; name a Python that has \
	both: make gpu-check PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

fuzz: $(ready) ## Feed the readers of files, arguments and connections with bad input, guided by coverage, FUZZ_S seconds each
	@for target in index side_file jsonl yaml argv stranger; do \
	  $(bin)/python -m tests.fuzz $$target --seconds $(FUZZ_S) || exit 1; done

lint: $(ready) ## Check style, format and types
	@failed=; set -x; \
	$(bin)/ruff check . || failed=1; \
	$(bin)/ruff format --check . || failed=1; \
	$(bin)/pyright --pythonpath $(bin)/python || failed=1; \
	{ set +x; } 2>/dev/null; [ -z "$$failed" ]

format: $(ready) ## Mend what ruff can mend
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

build: export MEGAGPT_REQUIRE_EXT := 1
build: $(ready) ## Compile csrc/
	$(bin)/python setup.py build_ext --inplace

clean: ## Remove what was built (.venv and runs/ stay)
	rm -rf build *.egg-info megagpt/*.so .pytest_cache .ruff_cache .hypothesis
	find megagpt tools examples tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first, because csrc/ is compiled against it. Where no GPU driver is, pip still takes the
# CPU build of the pinned version whenever an index it was given has one (README.md, "A smaller torch").
# When only csrc/ has changed, compiling it again is enough.
$(ready): pyproject.toml constraints.txt setup.py $(csrc)
ifeq ($(wildcard $(bin)/pip),)
	@got=$$($(PYTHON) --version 2>/dev/null) || got="no $(PYTHON)"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: got $$got, wanted Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
endif
	$(if $(filter-out csrc/%,$?),$(install) setuptools wheel pybind11 ninja numpy torch)
	$(if $(filter-out csrc/%,$?),$(install) --no-build-isolation -e '.[dev]',$(bin)/python setup.py build_ext --inplace)
	@touch $@
