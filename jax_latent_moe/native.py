"""Finds and loads the library of compiled kernels, registers its FFI targets with XLA, and calls them.

`native_interface.json` lists the targets: their operands and results in order, and their attributes, with types
("format" is the element type of the kernel). The build generates the C++ bindings from the same file
(custom_calls/generate.py). A hash of the file shows whether a library fits this package.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.export
import numpy as np

from jax_latent_moe.varying import varying

VARIABLE = "JAX_LATENT_MOE_CUDA_LIBRARY"
FILE = "libjax_latent_moe_cuda.so"
WHEEL = "jax_latent_moe_cuda13"
"""The package that holds the library where it was installed from a wheel."""
INSTALL = "`pip install -U 'jax-latent-moe[cuda13]'` installs it, or `make cuda` in a checkout"
REPLACE = "`pip install -U 'jax-latent-moe[cuda13]'` installs one that fits, or `make cuda` in a checkout"
PREFIX = "latent_moe_"
"""Prefix of every name that the library exports."""
INTERFACE = json.loads(pathlib.Path(__file__).with_name("native_interface.json").read_text())
CASTS = {"string": str, "bool": bool, "int32": np.int32, "float32": np.float32}


class Library(NamedTuple):
    """The kernels of the loaded library, or the reason why there are none.

    Attributes:
        kernels: the most experts that each kernel takes, by the kernel's name, in the library's order. A name is
            ARCHITECTURE.CONTRACTION.FORMAT[.ACTIVATION:RESIDUAL].ROWSxCOLUMNSxSTAGES.CLUSTER_ROWSxCLUSTER_COLUMNS.
        missing: None, or a sentence that says what is missing and how to get it.
    """

    kernels: dict[str, int]
    missing: str | None


@functools.cache
def library() -> Library:
    """Loads the library and registers its FFI targets, once per process.

    If a library exists but cannot be used, it warns, because `auto` would silently take slower kernels.
    """
    path = library_path()
    if not path.is_file():
        return Library({}, f"its compiled library {path.name} is not installed: {INSTALL}.")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return _unusable(f"its library {path} cannot be loaded ({error}). {REPLACE}.")
    if (found := _text(loaded, "interface_hash")) != interface_hash():
        what = f"has the interface {found or 'of an older version'}, not {interface_hash()}"
        return _unusable(f"its library {path} {what}. {REPLACE}.")
    for target in INTERFACE:
        jax.ffi.register_ffi_target(PREFIX + target, handlers(loaded, target), platform="CUDA")
    lines = (line.split() for line in (_text(loaded, "kernels") or "").splitlines())
    return Library({name: int(max_experts) for name, max_experts in lines}, None)


def _unusable(reason: str) -> Library:
    warnings.warn(f"The compiled kernels are not used: {reason}", RuntimeWarning, stacklevel=3)
    return Library({}, reason)


def library_path() -> pathlib.Path:
    """The file that `library` loads.

    It is $JAX_LATENT_MOE_CUDA_LIBRARY if that is set, or else the file that `make cuda` puts beside this module, or
    else the file of the kernels' wheel.
    """
    own = pathlib.Path(__file__).with_name(FILE)
    if named := os.environ.get(VARIABLE):
        return pathlib.Path(named)
    wheel = None if own.is_file() else importlib.util.find_spec(WHEEL)
    if wheel is None or not wheel.submodule_search_locations:
        return own
    return pathlib.Path(wheel.submodule_search_locations[0], FILE)


def interface_hash() -> str:
    """A hash of all targets, operands, results and attributes, with their order and types."""
    return hashlib.sha256(json.dumps(INTERFACE, separators=(",", ":")).encode()).hexdigest()[:16]


def handlers(loaded: ctypes.CDLL, target: str) -> dict:
    """The functions that XLA calls for a target: "initialize" before it records or runs a program, and "execute"."""
    stages = {"initialize": "initialize", "execute": target}
    return {stage: jax.ffi.pycapsule(getattr(loaded, PREFIX + name)) for stage, name in stages.items()}


def call(
    target: str,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    input_output_aliases: Mapping[int, int] | None = None,
    **attributes,
) -> list[jax.Array]:
    """Calls a target and returns its results, which vary over the mapped axes that any operand varies over.

    Args:
        target: a key of `INTERFACE`.
        operands: the operands, in the order of the interface.
        results: shapes and dtypes of the results, in the order of the interface.
        input_output_aliases: maps an operand's number to the number of the result that reuses its memory.
        **attributes: the attributes, which are cast to their types in the interface.

    Raises:
        TypeError: operands, results or attributes do not match the interface.
    """
    interface = INTERFACE[target]
    _check_buffers(target, "operands", operands)
    _check_buffers(target, "results", results)
    if attributes.keys() != interface["attributes"].keys():
        raise TypeError(
            f"{target} takes the attributes {_listed(interface['attributes'])}, not {_listed(attributes)}: "
            "pass exactly those."
        )
    cast = {name: CASTS[interface["attributes"][name]](value) for name, value in attributes.items()}
    function = jax.ffi.ffi_call(
        PREFIX + target,
        list(results),
        vmap_method="sequential",
        input_output_aliases=None if input_output_aliases is None else dict(input_output_aliases),
    )
    return varying(list(function(*operands, **cast)), operands)  # JAX types them as equal on all devices


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The checks that `jax.export.export` must leave out for a program that calls the library.

    JAX refuses to export custom calls whose compatibility it does not know. An exported program runs where the library
    has the same interface hash.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(PREFIX + target) for target in INTERFACE]


def _check_buffers(target: str, kind: str, buffers):
    """Checks the number of buffers, and the dtypes that the interface fixes."""
    interface = INTERFACE[target][kind]
    if len(buffers) != len(interface):
        raise TypeError(f"{target} takes {len(interface)} {kind} ({_listed(interface)}), not {len(buffers)}.")
    for (name, described), buffer in zip(interface.items(), buffers, strict=True):
        dtype = described.split()[0]
        if dtype not in ("format", buffer.dtype.name):
            raise TypeError(f"{target} takes {name} of its {kind} as {described}, not {buffer.dtype}: cast it.")


def _listed(names) -> str:
    return ", ".join(names) or "none"


def _text(loaded: ctypes.CDLL, name: str) -> str | None:
    """The text that a function of the library returns; None if it has no such function."""
    try:
        function = getattr(loaded, PREFIX + name)
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
