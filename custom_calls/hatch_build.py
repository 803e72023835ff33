"""Hatchling's hooks for the wheel of compiled kernels: what it needs, and the compiled library in it.

They compile nothing. scripts/wheels.sh names the compiled library in LATENT_MOE_CUDA_LIBRARY and CUTLASS' licence in
LATENT_MOE_CUTLASS_LICENSE.
"""

import os
import pathlib

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

PACKAGE = "jax_latent_moe_cuda13"
LICENSE = pathlib.Path(__file__).parents[1] / "LICENSE"


class Dependencies(MetadataHookInterface):
    """The kernels fit the release of the package that they were compiled for."""

    def update(self, metadata: dict) -> None:
        """Adds the dependency."""
        metadata["dependencies"] = [f"jax-latent-moe=={metadata['version']}"]


class Library(BuildHookInterface):
    """Puts the library and the licences into the wheel, and tags it for this machine."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Changes what is built.

        Raises:
            SystemExit: there is no compiled library.
        """
        del version
        library, licence = (os.environ.get(f"LATENT_MOE_{name}") for name in ("CUDA_LIBRARY", "CUTLASS_LICENSE"))
        if not library or not licence:
            raise SystemExit("error: this wheel is made of a compiled library: run scripts/wheels.sh, which builds it.")
        build_data["force_include"] = {
            library: f"{PACKAGE}/libjax_latent_moe_cuda.so",
            str(LICENSE): f"{PACKAGE}/LICENSE",
            licence: f"{PACKAGE}/LICENSE.cutlass",
        }
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
