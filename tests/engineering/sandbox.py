"""A copy of the set-up scripts with a faked PATH, to test machines without uv, Python or a network."""

import dataclasses
import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cksum", "dirname", "env", "head", "ls", "mkdir", "rm", "uname")

UV = """
echo "$*" >>"$CALLS"
case $1 in
--version) echo "uv 0.13.9" ;;
python) [[ $2 == find ]] && type -P python3.12 ;;
sync) PATH=/usr/bin:/bin; mkdir -p .venv/bin && printf '#!/bin/sh\\n' >.venv/bin/python && chmod +x .venv/bin/python ;;
esac
"""
PYTHON_312 = """
case $1 in
-c) echo "${0}" ;;
--version) echo "Python 3.12.1" ;;
esac
"""


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """A checkout of only the scripts, with `bin` as its whole PATH."""

    root: pathlib.Path

    @property
    def bin(self) -> pathlib.Path:
        return self.root / "bin"

    def command(self, name: str, body: str) -> pathlib.Path:
        """Puts a shell script called `name` on PATH."""
        path = self.bin / name
        path.unlink(missing_ok=True)  # it may be a link to the real one
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.bin), "HOME": str(self.root / "home"), "CALLS": str(self.root / "calls"), **env}
        return subprocess.run(
            [self.root / "scripts" / script, *args], env=environment, capture_output=True, text=True, timeout=60
        )

    def installs(self) -> list[str]:
        """The arguments of each `uv sync`."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith("sync ")]


def make(root: pathlib.Path) -> Sandbox:
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, root / name)
    sandbox = Sandbox(root)
    sandbox.bin.mkdir()
    for tool in TOOLS:
        real = shutil.which(tool)
        assert real, f"the scripts rely on {tool}"
        os.symlink(real, sandbox.bin / tool)
    return sandbox
