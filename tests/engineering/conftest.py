"""The documentation, built once for all tests that read it."""

import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

from jax_latent_moe import native
from tests.engineering.sandbox import ROOT


def cpu_alone() -> dict[str, str]:
    """The environment of a machine without a GPU and without compiled kernels."""
    missing = ROOT / "none" / native.FILE
    return {**os.environ, "JAX_PLATFORMS": "cpu", native.VARIABLE: str(missing)}


@pytest.fixture(scope="session")
def built_docs(tmp_path_factory) -> pathlib.Path:
    """The folder of the built pages. The build treats a warning as an error, and executes the tutorials."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "html"
    with (shared / "html.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be building
        if not (out / "objects.inv").exists():
            command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", shared / "trees"]
            run = subprocess.run(
                [*command, ROOT / "docs", out], cwd=ROOT, env=cpu_alone(), capture_output=True, text=True
            )
            assert run.returncode == 0, run.stderr
    return out
