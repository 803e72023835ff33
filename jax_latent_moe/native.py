"""Finds and loads the compiled kernels of the `cutlass` backend and registers them with XLA."""

import ctypes
import functools
import os
import pathlib
from typing import NamedTuple

import jax

from jax_latent_moe.config import BackendConfig, CutlassBackend, as_backend
from jax_latent_moe.device import default_device, is_hopper

ACTIVATIONS = ("relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "situ_glu")
VARIABLE = "JAX_LATENT_MOE_CUDA_LIBRARY"
FILE = "libjax_latent_moe_cuda.so"
INTERFACE_VERSION = 7
TARGETS = ("matmul", "matmul_activation", "matmul_activation_grad", "wgrad", "top_k", "sort")
INITIALIZE = "latent_moe_prepare"
"""Handler that XLA calls for each target before it records or runs a program."""

TYPES = ("bfloat16", "float16")
CONTRACTIONS = ("fwd", "dgrad", "wgrad")


class Instance(NamedTuple):
    """One compiled kernel.

    Attributes:
        dtype: of its operands.
        contraction: "fwd", "dgrad" or "wgrad".
        activation: the fused activation's name, or None.
        rows, columns, stages, cluster_rows, cluster_columns: its tile, as in `CutlassTile`.
        max_experts: experts whose bounds fit its shared memory.
    """

    dtype: str
    contraction: str
    activation: str | None
    rows: int
    columns: int
    stages: int
    cluster_rows: int
    cluster_columns: int
    max_experts: int


class Library(NamedTuple):
    """The kernels of the loaded library, or why there are none.

    Attributes:
        instances: all compiled kernels, in the library's order.
        missing: None, or a sentence that says what is missing and how to get it.
    """

    instances: tuple[Instance, ...]
    missing: str | None


@functools.cache
def library() -> Library:
    """Loads the library and registers its FFI targets, once a process."""
    path = _path()
    if not path.is_file():
        ways = "`make cuda` in the repository builds it, or `pip install .` with an nvcc."
        return Library((), f"its compiled library {path.name} is not there: {ways}")
    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.latent_moe_interface_version()
    except (OSError, AttributeError) as error:
        return Library((), f"its library {path} cannot be loaded ({error}): build it anew with `make cuda`.")
    if version != INTERFACE_VERSION:
        return Library(
            (),
            f"its library {path} is of interface {version}, not {INTERFACE_VERSION}: build it anew with `make cuda`.",
        )
    for target in TARGETS:
        jax.ffi.register_ffi_target(f"latent_moe_{target}", handlers(loaded, target), platform="CUDA")
    return Library(tuple(_instance(loaded, index) for index in range(loaded.latent_moe_num_instances())), None)


def compiled_runs(backend: str | BackendConfig) -> bool:
    """Whether what the library has beside matmuls runs for experts of that backend: "auto" or `CutlassBackend`."""
    platform, kind = default_device()
    return (
        (backend == "auto" or isinstance(as_backend(backend), CutlassBackend))
        and platform == "gpu"
        and is_hopper(kind)
        and not library().missing
    )


def handlers(loaded: ctypes.CDLL, target: str) -> dict:
    """What XLA calls for a target, by stage."""
    stages = {"initialize": INITIALIZE, "execute": f"latent_moe_{target}"}
    return {stage: jax.ffi.pycapsule(getattr(loaded, symbol)) for stage, symbol in stages.items()}


def _path() -> pathlib.Path:
    return pathlib.Path(os.environ.get(VARIABLE) or pathlib.Path(__file__).parent / FILE)


def _instance(loaded, index) -> Instance:
    fields = (ctypes.c_int32 * 10)()
    loaded.latent_moe_instance(index, fields)
    dtype, contraction, _, activation, rows, columns, stages, cluster_rows, cluster_columns, experts = fields
    return Instance(
        TYPES[dtype],
        CONTRACTIONS[contraction],
        ACTIVATIONS[activation - 1] if activation else None,
        rows,
        columns,
        stages,
        cluster_rows,
        cluster_columns,
        experts,
    )
