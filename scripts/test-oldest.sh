#!/usr/bin/env bash
# Runs the library's tests on the oldest packages that pyproject.toml allows, in an environment of their own.
# tests/requirements-oldest.txt names the command that wrote it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ENVIRONMENT=.tools/oldest

uv=$(scripts/uv.sh)
python=$(scripts/python.sh "$uv")
"$uv" venv --quiet --allow-existing --python "$python" "$ENVIRONMENT"
"$uv" pip sync --quiet --python "$ENVIRONMENT/bin/python" tests/requirements-oldest.txt
"$ENVIRONMENT/bin/python" -m pytest -n auto --ignore tests/engineering --ignore tests/examples "$@"
