#!/usr/bin/env bash
# Runs the tests that depend most on JAX and Flax, on the oldest versions that pyproject.toml allows, in an own environment.
# tests/requirements-oldest.txt names the command that wrote it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ENVIRONMENT=.tools/oldest
# The tests cover what an older version may lack: transformations, backends, kinds of layers and Flax APIs. The values are
# tested by `make test`.
TESTS=(
  tests/conformance/test_composition.py tests/conformance/test_values.py::test_random_groups
  tests/test_layer.py::test_{low_precision,float64,every_backend,capacity_bounds_every_expert}
  tests/test_layer.py::test_initial_layer_of_the_toy_preset_matches_the_oracle
  tests/test_composition.py tests/test_linen.py tests/test_nnx.py
  tests/test_pallas.py tests/parallel/test_transforms.py
  tests/test_pallas_fused.py::test_{activations_and_residuals,lowers_for_cuda}
  tests/test_pallas_fp8.py::test_lowers_for_cuda tests/test_pallas_widen.py::test_lowers_for_cuda
)

uv=$(scripts/uv.sh)
python=$(find_python "$uv")
"$uv" venv --quiet --allow-existing --python "$python" "$ENVIRONMENT"
"$uv" pip sync --quiet --python "$ENVIRONMENT/bin/python" tests/requirements-oldest.txt
# XLA's costly optimisations are off, because they double the time to compile. Only calls can fail here.
JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 "$ENVIRONMENT/bin/python" -m pytest -n auto "${TESTS[@]}" "$@"
