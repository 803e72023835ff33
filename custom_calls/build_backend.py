"""Builds the package (PEP 517) by hatchling, or with the kernels by scikit-build-core: a wheel, where there is an nvcc.

`-C wheel.cmake=false` leaves the kernels out, `-C wheel.cmake=true` fails where they cannot be compiled. Editable
installs go without: `make cuda` adds them there.
"""

import importlib.util
import pathlib

import nvcc
from hatchling import build as pure
from hatchling.build import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

HEADERS = pathlib.Path(__file__).with_name("headers.txt")
TOOLS = ["scikit-build-core>=1.1,<2", "cmake>=3.24", "ninja>=1.11"]


def get_requires_for_build_wheel(config_settings=None):
    """What compiling takes, where kernels are compiled."""
    if _compiler(config_settings)[0] is None:
        return pure.get_requires_for_build_wheel(config_settings)
    return TOOLS + [line for line in HEADERS.read_text().splitlines() if not line.startswith("#")]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """The wheel, and a line about the kernels."""
    compiler, why_none = _compiler(config_settings)
    if compiler is None:
        print(f"Without CUDA kernels: {why_none}.", flush=True)
        return pure.build_wheel(wheel_directory, config_settings, metadata_directory)
    from scikit_build_core import build

    print(f"Compiling CUDA kernels with {compiler}, for minutes; -C wheel.cmake=false does without.", flush=True)
    settings = {
        "cmake.define.CMAKE_CUDA_COMPILER": compiler,
        "cmake.define.LATENT_MOE_CUTLASS_INCLUDE": _folder("cutlass_library", "source/include"),
        "cmake.define.LATENT_MOE_XLA_INCLUDE": _folder("jaxlib", "include"),
        **(config_settings or {}),
    }
    return build.build_wheel(wheel_directory, settings, metadata_directory)


def _compiler(config_settings):
    """The nvcc to compile kernels with, or None and why."""
    choice = (config_settings or {}).get("wheel.cmake")
    if choice not in (None, "true", "false"):
        raise SystemExit(
            f"error: wheel.cmake={choice!r} must be true or false, or be left out (true if there is an nvcc)."
        )
    if choice == "false":
        return None, "wheel.cmake=false"
    try:
        return nvcc.find(), None
    except nvcc.NotFoundError as error:
        if choice == "true":
            raise SystemExit(f"error: wheel.cmake=true asks for CUDA kernels, but {error}.") from None
        return None, str(error)


def _folder(module, path):
    """A folder inside of an installed module, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"error: {module} is not installed: install what {HEADERS.name} lists, or build in isolation.")
    return str(pathlib.Path(spec.submodule_search_locations[0], path))
