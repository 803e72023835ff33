# shellcheck shell=bash
# Sourced by the other scripts. Each runs from the repository's root, and ends with one sentence if it cannot go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # with it, every process would compile JAX anew, for seconds

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Lists every executable of that name on PATH: the first may be a version manager's shim that only prints an error.
on_path() {
  type -aP "$@" 2>/dev/null || true
}

PYTHONS='>=3.12,<3.15' # those for which the locked packages have wheels

# Prints the path of such a Python. If uv finds none, it downloads one. usage: find_python UV
find_python() {
  "$1" python find --system --no-project "${UV_PYTHON:-$PYTHONS}" 2>/dev/null && return
  echo "Fetching Python 3.12 with uv" >&2
  mkdir -p .tools
  "$1" python install --quiet 3.12 2>.tools/python.log ||
    die "no Python 3.12, 3.13 or 3.14 was found and uv could not download one (.tools/python.log says why):" \
      "install one, or name one in UV_PYTHON, or check the network, and run make again."
  "$1" python find --system --no-project --managed-python 3.12 2>/dev/null
}
