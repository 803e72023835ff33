#!/usr/bin/env bash
# Makes .venv from uv.lock for this machine, with the trainer's text. Later calls need no network and no time.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STAMP=.venv/.setup

case $(uname -s)-$(uname -m) in
Linux-x86_64 | Linux-aarch64 | Darwin-arm64) ;;
*) die "JAX has no wheels for $(uname -s) on $(uname -m): use Linux (x86_64, aarch64) or a Mac with Apple silicon." ;;
esac

device=$(scripts/device.sh)
state="$device $PWD $(cat pyproject.toml uv.lock | cksum)"
if [[ -f $STAMP && $(<"$STAMP") == "$state" ]] && .venv/bin/python -c '' 2>/dev/null; then
  exit
fi

uv=$(scripts/uv.sh)
python=$(find_python "$uv")
echo "Making .venv: $device, $("$python" --version), $("$uv" --version)" >&2
rm -f "$STAMP"
env -u VIRTUAL_ENV UV_PROJECT_ENVIRONMENT=.venv "$uv" sync --locked --python "$python" \
  --extra "$device" --extra flax --extra train ||
  die "uv could not install the packages of uv.lock, for the reason given above: fix it and run make again."
echo "$state" >"$STAMP"
