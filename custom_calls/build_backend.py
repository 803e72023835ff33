"""Builds the package (PEP 517) by scikit-build-core, with the kernels in the wheel where there is an nvcc for them.

`-C wheel.cmake=false` leaves the kernels out, `-C wheel.cmake=true` fails where they cannot be compiled; so does
$SKBUILD_WHEEL_CMAKE, which is scikit-build-core's and goes first. Editable installs go
without: `make cuda` adds them there.
"""

import importlib.util
import os
import pathlib

import nvcc
from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

HEADERS = pathlib.Path(__file__).with_name("headers.txt")


def get_requires_for_build_wheel(config_settings=None):
    """CMake and the headers, where kernels are compiled."""
    settings, why_none = _settings(config_settings)
    headers = [line for line in HEADERS.read_text().splitlines() if not line.startswith("#")]
    return scikit_build.get_requires_for_build_wheel(settings) + ([] if why_none else headers)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    """The wheel's metadata: its tag says whether there are kernels."""
    return scikit_build.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings)[0])


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """The wheel, and a line about the kernels."""
    settings, why_none = _settings(config_settings)
    if why_none:
        print(f"Without CUDA kernels: {why_none}.", flush=True)
    else:
        compiler = settings["cmake.define.CMAKE_CUDA_COMPILER"]
        print(f"Compiling CUDA kernels with {compiler}, for minutes; -C wheel.cmake=false does without.", flush=True)
        settings = {
            "cmake.define.LATENT_MOE_CUTLASS_INCLUDE": _folder("cutlass_library", "source/include"),
            "cmake.define.LATENT_MOE_XLA_INCLUDE": _folder("jaxlib", "include"),
            **settings,
        }
    return scikit_build.build_wheel(wheel_directory, settings, metadata_directory)


def _settings(config_settings):
    """The user's settings and what they leave open, and why no kernels are compiled (None: they are)."""
    settings = dict(config_settings or {})
    choice = os.environ.get("SKBUILD_WHEEL_CMAKE") or settings.get("wheel.cmake")
    if choice not in (None, "true", "false"):
        raise SystemExit(f"error: wheel.cmake={choice!r} must be true or false (or not set: where there is an nvcc).")
    if choice == "false":
        return {**settings, "wheel.cmake": "false"}, "wheel.cmake=false"
    try:
        return {"cmake.define.CMAKE_CUDA_COMPILER": nvcc.find(), **settings, "wheel.cmake": "true"}, None
    except nvcc.NotFoundError as error:
        if choice == "true":
            raise SystemExit(f"error: wheel.cmake=true asks for CUDA kernels, but {error}.") from None
        return {**settings, "wheel.cmake": "false"}, str(error)


def _folder(module, path):
    """A folder inside of an installed module, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"error: {module} is not installed: install what {HEADERS.name} lists, or build in isolation.")
    return str(pathlib.Path(spec.submodule_search_locations[0], path))
