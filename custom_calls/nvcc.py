"""Finds the machine's nvcc: $CUDACXX, the one in $CUDA_HOME, or the one on PATH.

Run as a script, it prints the path, or fails with the reason why there is none.
"""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

OLDEST = (12, 4)


class NotFoundError(Exception):
    """No nvcc can compile the kernels; the message says why."""


def find() -> str:
    """The path of the first nvcc that is new enough.

    Raises:
        NotFoundError: there is no such nvcc, or the library cannot be built on this platform.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NotFoundError(
            f"they are built only on Linux on x86_64, and this is {sys.platform} on {platform.machine()}"
        )
    home = os.environ.get("CUDA_HOME")
    named = (os.environ.get("CUDACXX"), home and str(pathlib.Path(home, "bin/nvcc")), "nvcc")
    found = [path for name in named if name and (path := shutil.which(name))]
    for path in found:
        if _version(path) >= OLDEST:
            return os.path.realpath(path)
    oldest = ".".join(map(str, OLDEST))
    if found:
        raise NotFoundError(f"{', '.join(found)} is not an nvcc of version {oldest} or newer")
    raise NotFoundError(f"there is no nvcc (version {oldest} or newer) on PATH, at $CUDACXX or in $CUDA_HOME/bin")


def _version(path: str) -> tuple[int, ...]:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True)
    except OSError:
        return ()
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    return tuple(map(int, release.groups())) if release else ()


if __name__ == "__main__":
    try:
        print(find())
    except NotFoundError as error:
        sys.exit(str(error))
