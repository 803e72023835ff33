#!/usr/bin/env bash
# Runs the tests that lean on JAX and Flax most, on the oldest versions that pyproject.toml allows, in their own environment.
# tests/requirements-oldest.txt names the command that wrote it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ENVIRONMENT=.tools/oldest
TESTS=(
  tests/conformance tests/test_layer.py tests/test_composition.py tests/test_linen.py tests/test_nnx.py
  tests/test_pallas.py tests/test_pallas_fused.py tests/parallel/test_transforms.py
)

uv=$(scripts/uv.sh)
python=$(scripts/python.sh "$uv")
"$uv" venv --quiet --allow-existing --python "$python" "$ENVIRONMENT"
"$uv" pip sync --quiet --python "$ENVIRONMENT/bin/python" tests/requirements-oldest.txt
JAX_PLATFORMS=cpu "$ENVIRONMENT/bin/python" -m pytest -n auto "${TESTS[@]}" \
  --deselect tests/test_pallas_fused.py::test_groups "$@" # minutes of interpreting, and done on the locked versions
