# Most targets set up the environment first (scripts/setup.sh). GNU make 3.81, the version of macOS, is enough.
PYTHON := .venv/bin/python
WORKERS ?= auto
ARGS ?=
# Python keeps the bytecode of what it imports. Some images switch that off, and then each of the tests' many processes
# compiles JAX anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup cuda wheels train plan test test-gpu sanitize bench lint lint-bazel format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv from uv.lock (Python and uv are found or fetched)
	@scripts/setup.sh

train: setup ## train the example; ARGS="--help" lists its options
	$(PYTHON) -m examples.train $(ARGS)

plan: setup ## estimate a layer's memory and time on a mesh of GPUs; ARGS="--help" lists the options
	JAX_PLATFORMS=cpu $(PYTHON) -m jax_latent_moe.plan $(ARGS)

test: setup ## run the whole test suite, on the CPU; ARGS go to pytest
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(WORKERS) $(ARGS)

# tf32 is off: XLA uses it for float32 matmuls on a GPU, and the tolerances do not allow for it.
test-gpu: setup ## run the tests of the GPU kernels, the conformance suite and the layer's tests on an NVIDIA GPU
	@scripts/device.sh | grep -q cuda || { echo "error: nvidia-smi shows no GPU with driver 525 or newer." >&2; exit 1; }
	JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest $(PYTHON) -m pytest \
	  tests/gpu tests/conformance tests/test_layer.py $(ARGS)

sanitize: setup ## run the GPU tests under compute-sanitizer; ARGS="--help" lists the options
	JAX_PLATFORMS=cuda,cpu $(PYTHON) scripts/sanitize.py $(ARGS)

bench: setup ## time the layer and its matmuls
	$(PYTHON) -m benchmarks $(ARGS)

cuda: ## compile the kernels of the cutlass backend into the package; fetches a compiler if there is none
	@scripts/build-cuda.sh

wheels: ## build and check the wheels of the package and of its compiled kernels, in dist/
	@scripts/wheels.sh

lint: setup ## ruff, pyright and shellcheck
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m pyright
	.venv/bin/shellcheck -x -P SCRIPTDIR scripts/*.sh examples/launch/*.sh .ci/run

lint-bazel: ## buildifier over the Bazel files (needs npm)
	npx --yes @bazel/buildifier@8.2.1 -mode=check -lint=warn MODULE.bazel WORKSPACE.bazel BUILD.bazel */BUILD.bazel

format: setup ## format the code with ruff, and fix what ruff can fix
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

docs: setup ## build docs/ into docs/_build/html; a warning is an error
	$(PYTHON) -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean: ## remove the environment, fetched tools and caches; runs/ stays
	rm -rf .venv .tools .cache .pytest_cache .ruff_cache .hypothesis build dist docs/_build
