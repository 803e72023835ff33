#!/usr/bin/env bash
# Prints the path of a uv that runs here. If there is none, it fetches the pinned one into .tools/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PINNED=0.13.9
FETCHED=.tools/uv/bin/uv
LOG=.tools/uv.log

runs() { # the lock file needs uv 0.8 or newer
  local version
  version=$("$1" --version 2>/dev/null) || return 1
  [[ $version =~ ^uv\ ([0-9]+)\.([0-9]+) ]] || return 1
  ((BASH_REMATCH[1] > 0 || BASH_REMATCH[2] >= 8))
}

find_uv() {
  local uv
  while IFS= read -r uv; do
    if runs "$uv"; then
      echo "$uv"
      return
    fi
  done < <(on_path uv; echo "${HOME:-}/.local/bin/uv"; echo "${HOME:-}/.cargo/bin/uv"; echo "$PWD/$FETCHED")
  return 1
}

fetch_with() {
  local python=$1
  rm -rf .tools/uv
  if "$python" -m venv .tools/uv; then
    .tools/uv/bin/python -m pip install --retries 1 --only-binary=:all: "uv==$PINNED"
  else # Debian's python3 has no venv, but its pip can install into a folder
    rm -rf .tools/uv
    PIP_USER=0 "$python" -m pip install --retries 1 --only-binary=:all: --target .tools/uv "uv==$PINNED"
  fi
}

can_fetch() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null || "$1" -m pip --version >/dev/null 2>&1
}

find_uv && exit

mkdir -p .tools
: >"$LOG"
seen=""
while IFS= read -r python; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || continue
  seen=$python
  can_fetch "$python" || continue
  echo "Fetching uv $PINNED with $python" >&2
  if ! fetch_with "$python" >>"$LOG" 2>&1 || ! runs "$PWD/$FETCHED"; then
    die "uv $PINNED could not be fetched from PyPI ($LOG says why): check the network, or install uv, and run make again."
  fi
  echo "$PWD/$FETCHED"
  exit
done < <(on_path python3.14 python3.13 python3.12 python3)

[[ -n $seen ]] || die "neither uv nor python3 (3.8 or newer) works here: install one of them and run make again."
die "there is no uv, and $seen has neither venv nor pip to fetch it with:" \
  "install uv, or python3-venv (the package's name on Debian and Ubuntu), and run make again."
