"""Codes that were made elsewhere, one in a byte, to and from the order in which a `ScaledArray` holds them."""

import jax.numpy as jnp
from jaxtyping import Array

from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats.registry import FORMATS


def pack(codes: Array, name: str) -> Array:
    """Codes as a `ScaledArray` of this format holds them, with two codes of four bits in a byte.

    Args:
        codes: [..., N, K], uint8. E2M1 codes have the sign in bit 3, and integers are from 0 to 15.
        name: name of a format with `Format.pack`: `mxfp4`, `nvfp4`, or one of 4-bit integers.

    Returns:
        [..., N, K / 2], uint8.

    Raises:
        ConfigError: no format has that name, or its codes need no packing.
        InputError: the codes are not uint8, or K is not a multiple of what the format needs.
    """
    format, function, _ = _functions(name)
    return function(_checked(codes, name, format.multiples()[0]))


def unpack(codes: Array, name: str) -> Array:
    """The codes that `pack` was given."""
    format, _, function = _functions(name)
    return function(_checked(codes, name, format.multiples()[0] // format.packing))


def _functions(name):
    """The format, its pack and its unpack."""
    format = FORMATS.get(name)
    if format is None or format.pack is None or format.unpack is None:
        known = ", ".join(name for name, format in FORMATS.items() if format.pack and format.unpack)
        raise ConfigError(f"format={name!r} must be one of {known}: a ScaledArray of another holds codes as they are.")
    return format, format.pack, format.unpack


def _checked(codes, name, multiple):
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.uint8:
        raise InputError(f"codes of dtype {codes.dtype} must be uint8: cast them.")
    if not codes.ndim or codes.shape[-1] % multiple:
        raise InputError(
            f"codes of shape {codes.shape} must have a last axis of a multiple of {multiple}, which {name} needs: pad "
            "the weight, or choose a format with smaller blocks."
        )
    return codes
