# make demo / make test on a machine with nothing installed but Python 3.10 or newer. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.PHONY: help env demo ablation bench-upcycle bench-train gpu faults test lint unit test-312 slurm-packages slurm clean

PYTHON ?= python3
PYTHON312 ?=
EXTRAS := hf,plot,tensorboard,wandb,dev
PIP := -m pip --quiet --quiet --disable-pip-version-check --no-input
BIN := .venv/bin
# Ranks of a test share the cores: one thread each is faster than all of them fighting.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PATH="$(CURDIR)/$(BIN):$$PATH"

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  settings: PYTHON=python3.11 (makes .venv), PYTHON312=PATH (makes .venv312), DENSE=DIR and DATA='*.jsonl' (make demo), ABLATION='--seeds 1' (make ablation; tools/ablation.py --help)"

env: .venv/installed  ## make .venv with this package, its extras and the pinned versions

demo: .venv/installed  ## dense model -> MoE -> training -> export -> report, in runs/demo
	@$(BIN)/python tools/demo.py $(if $(DENSE),--dense '$(DENSE)') $(if $(DATA),--data '$(DATA)')

ablation: .venv/installed  ## the routing ablation, an hour on two cores: gate normalization and coefficients, three seeds, in runs/ablation
	@$(BIN)/python tools/ablation.py $(ABLATION)

bench-upcycle: .venv/installed  ## upcycling against plain writing on the same disk, and its memory, half an hour and 55 GB free: FOLDER=DIR, MERGEKIT=PATH of mergekit-moe
	@$(BIN)/python benchmarks/upcycle.py --memory-layers 2,4,8 $(if $(FOLDER),--folder '$(FOLDER)') $(if $(MERGEKIT),--mergekit '$(MERGEKIT)')

bench-train: .venv/installed  ## a training step against plain megatron-core and transformers, minutes: TRAIN='--precision fp32' (benchmarks/train_step.py --help)
	@$(BIN)/python benchmarks/train_step.py $(TRAIN)

gpu: .venv/installed  ## on a machine with NVIDIA GPUs: the tests of kernels and host waits, then the benchmarks of training and memory
	@$(BIN)/python -m pytest -q tests/gpu tests/unit/test_weight_gradients.py tests/unit/test_grouped_mlp.py tests/unit/test_permutation.py \
	    tests/distributed/test_experts.py tests/distributed/test_documents.py tests/distributed/test_output_loss_ranks.py tests/distributed/test_optimizer.py
	@$(BIN)/python benchmarks/train_step.py $(TRAIN)
	@$(BIN)/python benchmarks/memory.py

faults: .venv/installed  ## everything done to saves, data and ranks on purpose, and what was lost: one table, under 45 minutes; FAULTS='--only kill' (tests/faults/suite.py --help)
	@$(TEST_ENV) $(BIN)/python tests/faults/suite.py $(FAULTS)

test: .venv/installed lint unit test-312  ## everything CI runs: ruff, mypy, all tests, and tests/distributed on Python 3.12
	@grep -E '^SKIPPED.*(SLURM was|two hosts were) not tested' .venv/pytest.log > .venv/not_tested || exit 0; \
	    echo "=================================================================================="; \
	    cat .venv/not_tested; \
	    echo "=================================================================================="
	@echo "== closing lines"
	@tail -n 1 .venv/pytest.log | sed 's/^/all tests:          /'
	@if [ -f .venv312/pytest.log ]; then tail -n 1 .venv312/pytest.log | sed 's/^/Python 3.12 ranks:  /'; else echo "Python 3.12 ranks:  NOT RUN (see above)"; fi

lint: .venv/installed  ## ruff and mypy
	@echo "== ruff"
	@$(BIN)/ruff check .
	@echo "== mypy"
	@$(BIN)/mypy

unit: .venv/installed
	@echo "== pytest ($$($(BIN)/python --version), megatron-core $$($(BIN)/python -c 'from importlib.metadata import version; print(version("megatron-core"))'))"
	@$(TEST_ENV) $(BIN)/python -m pytest -q --durations=15 tests 2>&1 | tee .venv/pytest.log

slurm-packages:  ## as root on Debian: install what the tests of SLURM and of two hosts need (make test skips them without)
	@tests/slurm/install.sh

slurm: .venv/installed  ## the tests on a SLURM of their own and on two hosts made of network namespaces
	@$(TEST_ENV) $(BIN)/python -m pytest -q --durations=0 tests/slurm tests/hosts

# The other megatron-core: pip gives 0.16 below Python 3.12 and 0.19 from there on.
test-312: .venv/installed  ## tests/distributed on Python 3.12 with megatron-core 0.19, where a Python 3.12 is present
	@rm -f .venv312/pytest.log
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then \
	    echo "== Python 3.12: .venv is $$($(BIN)/python --version) already, the tests above ran with its megatron-core"; exit 0; \
	fi; \
	found=""; \
	for candidate in "$(PYTHON312)" python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do \
	    if [ -n "$$candidate" ] && "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "=================================================================================="; \
	    echo "SKIPPED: no Python 3.12 here, so nothing was tested against megatron-core 0.19."; \
	    echo "         Install one, or name it: make test PYTHON312=/path/to/python3.12"; \
	    echo "=================================================================================="; \
	    exit 0; \
	fi; \
	if [ ! -f .venv312/installed ] || [ setup.py -nt .venv312/installed ] || [ constraints.txt -nt .venv312/installed ]; then \
	    echo "== making .venv312 with $$found (minutes: torch is large)"; \
	    "$$found" -m venv .venv312; \
	    .venv312/bin/python $(PIP) install -c constraints.txt -e '.[hf]' pytest; \
	    touch .venv312/installed; \
	fi; \
	echo "== pytest tests/distributed ($$(.venv312/bin/python --version), megatron-core $$(.venv312/bin/python -c 'from importlib.metadata import version; print(version("megatron-core"))'))"; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PATH="$(CURDIR)/.venv312/bin:$$PATH" .venv312/bin/python -m pytest -q tests/distributed 2>&1 | tee .venv312/pytest.log

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1), and Python 3.10 or newer is needed. Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot make environments (Debian and Ubuntu: install the package python3-venv), or name another: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 2; }
	@echo "== making .venv with $$($(PYTHON) --version) (minutes: torch is large)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

clean:  ## remove the environments and what tools left behind; runs/ and .cache/ stay
	rm -rf .venv .venv312 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
