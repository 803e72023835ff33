#!/usr/bin/env bash
# Prints the path of a Python for which the locked packages have wheels. If there is none, uv downloads one.
# usage: scripts/python.sh UV
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

uv=$1

resolve() { # the path behind a shim, if it is 3.12 to 3.14 and not a free-threaded build
  "$1" -c 'import sys, sysconfig
if not (3, 12) <= sys.version_info < (3, 15) or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
print(sys.executable)' 2>/dev/null
}

candidates() {
  on_path python3.12 python3.13 python3.14 python3
  ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[234]*/bin/python3 2>/dev/null || true
  "$uv" python find --quiet --no-project --no-python-downloads '>=3.12,<3.15' 2>/dev/null || true
}

while IFS= read -r python; do
  resolve "$python" && exit
done < <(candidates)

echo "Fetching Python 3.12 with uv" >&2
mkdir -p .tools
"$uv" python install --quiet 3.12 2>.tools/python.log ||
  die "no Python 3.12, 3.13 or 3.14 was found and uv could not download one (.tools/python.log says why):" \
    "install one, or check the network, and run make again."
"$uv" python find --quiet --no-project --no-python-downloads --managed-python 3.12
