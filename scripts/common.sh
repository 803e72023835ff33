# shellcheck shell=bash
# Sourced by the scripts here: every one runs from the repository's root and ends in one sentence where it cannot go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Every executable of that name on PATH: a version manager's shim may come first and answer only with an error.
on_path() {
  type -aP "$@" 2>/dev/null || true
}
