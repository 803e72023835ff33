# shellcheck shell=bash
# Sourced by the other scripts. Each runs from the repository's root, and ends with one sentence if it cannot go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Lists every executable of that name on PATH: the first may be a version manager's shim that only prints an error.
on_path() {
  type -aP "$@" 2>/dev/null || true
}
