"""The library of compiled kernels: finds it, loads it, registers its FFI targets with XLA, and calls them.

`native_interface.json` lists the targets: operands and results in order, attributes by name, with their types ("format"
is the element type of the kernel). The build makes the C++ bindings from the same file (custom_calls/generate.py), and
a hash of it tells whether a library still fits.
"""

import ctypes
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.export
import numpy as np

VARIABLE = "JAX_LATENT_MOE_CUDA_LIBRARY"
FILE = "libjax_latent_moe_cuda.so"
PREFIX = "latent_moe_"
"""Of everything that the library exports."""
INTERFACE = json.loads(pathlib.Path(__file__).with_name("native_interface.json").read_text())
CASTS = {"string": str, "bool": bool, "int32": np.int32, "float32": np.float32}


class Library(NamedTuple):
    """The kernels of the loaded library, or why there are none.

    Attributes:
        kernels: by name, the most experts that each takes, in the library's order. A name reads
            ARCHITECTURE.CONTRACTION.FORMAT[.ACTIVATION:RESIDUAL].ROWSxCOLUMNSxSTAGES.CLUSTER_ROWSxCLUSTER_COLUMNS.
        missing: None, or a sentence that says what is missing and how to get it.
    """

    kernels: dict[str, int]
    missing: str | None


@functools.cache
def library() -> Library:
    """Loads the library and registers its FFI targets, once a process."""
    path = library_path()
    if not path.is_file():
        ways = "`make cuda` in the repository builds it, or `pip install .` with an nvcc."
        return Library({}, f"its compiled library {path.name} is not there: {ways}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return Library({}, f"its library {path} cannot be loaded ({error}): build it anew with `make cuda`.")
    if (found := _text(loaded, "interface_hash")) != interface_hash():
        theirs = "an older kind" if found is None else found
        what = f"has an interface of {theirs}, not {interface_hash()}"
        return Library({}, f"its library {path} {what}: build it anew with `make cuda`.")
    for target in INTERFACE:
        jax.ffi.register_ffi_target(PREFIX + target, handlers(loaded, target), platform="CUDA")
    lines = (line.split() for line in (_text(loaded, "kernels") or "").splitlines())
    return Library({name: int(max_experts) for name, max_experts in lines}, None)


def library_path() -> pathlib.Path:
    """The file that `library` loads: the one that $JAX_LATENT_MOE_CUDA_LIBRARY names, or the package's own."""
    return pathlib.Path(os.environ.get(VARIABLE) or pathlib.Path(__file__).with_name(FILE))


def interface_hash() -> str:
    """Changes with every target, operand, result and attribute, and with their order and types."""
    return hashlib.sha256(json.dumps(INTERFACE, separators=(",", ":")).encode()).hexdigest()[:16]


def handlers(loaded: ctypes.CDLL, target: str) -> dict:
    """What XLA calls for a target, by stage: "initialize" before it records or runs a program, and "execute"."""
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
    """The results of a target.

    Args:
        target: a key of `INTERFACE`.
        operands: in the order of the interface.
        results: shapes and dtypes, likewise.
        input_output_aliases: operands, by number, whose memory a result takes.
        **attributes: cast to their types in the interface.

    Raises:
        TypeError: operands, results or attributes are not those of the interface.
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
    return list(function(*operands, **cast))


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The checks that `jax.export.export` must leave out for a program that calls the library.

    JAX refuses to export custom calls whose compatibility it does not know. An exported program runs where the library
    has the same interface hash.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(PREFIX + target) for target in INTERFACE]


def _check_buffers(target: str, kind: str, buffers):
    """Counts them, and compares the dtypes that the interface fixes."""
    interface = INTERFACE[target][kind]
    if len(buffers) != len(interface):
        raise TypeError(f"{target} has {len(interface)} {kind} ({_listed(interface)}), not {len(buffers)}.")
    for (name, described), buffer in zip(interface.items(), buffers, strict=True):
        dtype = described.split()[0]
        if dtype not in ("format", buffer.dtype.name):
            raise TypeError(f"{target} has {name} among its {kind} as {described}: {buffer.dtype} must be cast to it.")


def _listed(names) -> str:
    return ", ".join(names) or "none"


def _text(loaded: ctypes.CDLL, name: str) -> str | None:
    """What a function of the library says, None where it has no such function."""
    try:
        function = getattr(loaded, PREFIX + name)
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
