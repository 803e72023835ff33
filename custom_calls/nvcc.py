"""Finds the machine's nvcc: that of $CUDACXX, of $CUDA_HOME or on PATH.

As a script it prints its path, or fails with the reason why there is none.
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
    """There is no nvcc to compile the kernels with; the message says why."""


def find() -> str:
    """The path of the first nvcc that is new enough.

    Raises:
        NotFoundError: there is none, or the library cannot be built on this platform.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NotFoundError(
            f"they are built on Linux on x86_64 alone, and this is {sys.platform} on {platform.machine()}"
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
