"""The build backend of the package (PEP 517). It uses hatchling, or scikit-build-core for a wheel with kernels.

A wheel gets kernels if there is an nvcc. `-C wheel.cmake=false` leaves them out, and `-C wheel.cmake=true` fails if
they cannot be compiled. An editable install has none: `make cuda` adds them.
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
    """The packages that the build needs, with those for the kernels if they are compiled."""
    if _compiler(config_settings)[0] is None:
        return pure.get_requires_for_build_wheel(config_settings)
    return TOOLS + [line for line in HEADERS.read_text().splitlines() if not line.startswith("#")]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds the wheel, and prints a line about the kernels."""
    compiler, why_none = _compiler(config_settings)
    if compiler is None:
        print(f"Without CUDA kernels: {why_none}.", flush=True)
        return pure.build_wheel(wheel_directory, config_settings, metadata_directory)
    from scikit_build_core import build

    print(f"Compiling CUDA kernels with {compiler} takes minutes; -C wheel.cmake=false leaves them out.", flush=True)
    settings = {
        "cmake.define.CMAKE_CUDA_COMPILER": compiler,
        "cmake.define.LATENT_MOE_CUTLASS_INCLUDE": _folder("cutlass_library", "source/include"),
        "cmake.define.LATENT_MOE_XLA_INCLUDE": _folder("jaxlib", "include"),
        **(config_settings or {}),
    }
    return build.build_wheel(wheel_directory, settings, metadata_directory)


def _compiler(config_settings):
    """The nvcc to compile kernels with; or None, and the reason."""
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
    """The path of a folder in an installed module, found without an import."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"error: {module} is not installed: install what {HEADERS.name} lists, or build in isolation.")
    return str(pathlib.Path(spec.submodule_search_locations[0], path))
