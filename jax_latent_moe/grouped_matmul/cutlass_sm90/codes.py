"""Weights in codes as the compiled kernels take them: their name for the codes of a format, and its arrays."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.formats.fp8 import BLOCK, wide_scales

# By format: the kernels' name for its codes, and the scales that they read, by name and dtype.
CODES = {
    **dict.fromkeys(("fp8_block", "fp8_block_pow2"), ("e4m3", {"block": "float32"})),
    "fp8_tensor": ("e4m3", {"tensor": "float32"}),
    "fp8_channel": ("e4m3", {"channel": "float32"}),
    "int8": ("int8", {"channel": "float32"}),
    "mxfp4": ("mxfp4", {"block": "uint8"}),
    "nvfp4": ("nvfp4", {"block": "uint8", "tensor": "float32"}),
    **dict.fromkeys(("int4_32", "int4_128"), ("int4", {"block": "bfloat16"})),
    **dict.fromkeys(("int4_32_zero", "int4_128_zero"), ("int4", {"block": "bfloat16", "zero": "uint8"})),
}
READ_BYTES = 16
"""Bytes of codes along K that a thread reads at once."""


def wrong_scales(name: str, weight: ScaledArray) -> str | None:
    """None, or the scales of a weight of that name whose dtype the kernels do not read, without a full stop."""
    for scale, wanted in CODES[weight.format][1].items():
        if (dtype := weight.scales[scale].dtype) != wanted:
            return f"the scales {scale!r} of {name} are {dtype}, not {wanted}"
    return None


def readable(w: ScaledArray) -> ScaledArray:
    """The weight with its 32-bit scales in float32, whatever they are stored in.

    Raises:
        InputError: another scale has a dtype that the kernels do not read.
    """
    scales = dict(w.scales)
    for name, wanted in CODES[w.format][1].items():
        if wanted == "float32":
            scales[name] = wide_scales(scales) if name == "block" else scales[name].astype(wanted)
    w = dataclasses.replace(w, scales=scales)
    if (reason := wrong_scales("w", w)) is not None:
        raise InputError(f"{reason}: convert them, or decode the weight with XlaBackend().")
    return w


def stored(weight: ScaledArray) -> tuple[Array, Array, Array]:
    """Codes, scales, and the zero points or the scales of matrices, which few formats have."""
    scales = [weight.scales[name] for name in CODES[weight.format][1]]
    nothing = jnp.zeros(0, jnp.float32)
    return weight.codes, scales[0], scales[1] if len(scales) > 1 else nothing


def side_by_side(weight: ScaledArray) -> ScaledArray | None:
    """Matrices [E, P, N, ...] as one of [E, 1, P * N, ...], without a copy of the codes. None if their scales differ.

    The scale of a whole matrix becomes one for each output. nvfp4 has no place for that. A block of 128 outputs that
    share a scale may not hold outputs of two matrices.
    """
    experts, parts, n, _ = weight.codes.shape
    if parts == 1:
        return weight
    scales = {}
    for name in CODES[weight.format][1]:
        scale = weight.scales[name]
        if name == "tensor":
            scale = jnp.broadcast_to(scale, (experts, parts, n, 1))
        scales[name] = scale.reshape(experts, 1, -1, scale.shape[-1])
    if weight.format == "nvfp4" or (scales.keys() == {"block"} and CODES[weight.format][0] == "e4m3" and n % BLOCK):
        return None
    return ScaledArray(weight.codes.reshape(experts, 1, parts * n, -1), scales, weight.format)
