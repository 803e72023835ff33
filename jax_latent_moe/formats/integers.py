"""Integer weights: 4 bits with a bfloat16 scale for each 32 or 128 along K, and 8 bits with one for each output.

A value is rounded to the nearest code, ties to even. Four-bit codes are from 0 to 15. `packing` says where they are.

A block with NaN or infinity decodes to NaN.
"""

import functools

import jax.numpy as jnp
from jax import lax

from jax_latent_moe.formats.blocks import divided, largest, one_if_zero, spread
from jax_latent_moe.formats.packing import GROUP, pack_integers, unpack_integers
from jax_latent_moe.formats.registry import Format

ZERO = 8
"""The code of 0 in a format without zero points."""


def _bfloat16(scales):
    """The scales rounded to bfloat16, as float32. XLA may leave out a conversion there and back, but not this."""
    return lax.reduce_precision(one_if_zero(scales), exponent_bits=8, mantissa_bits=7)


def _codes(scaled, least, most, dtype):
    """Rounded values within the codes' range; 0 for NaN, whose scale is NaN as well."""
    return jnp.clip(jnp.where(jnp.isnan(scaled), 0, jnp.round(scaled)), least, most).astype(dtype)


def _encode_symmetric(values, group):
    """The rule of compressed-tensors (calculate_qparams): scale = amax / 7.5, codes -8 to 7."""
    scales = _bfloat16(divided(largest(values, (group, 1)), 7.5))
    scaled = divided(values, spread(scales, (group, 1), *values.shape[-2:]))
    codes = (_codes(scaled, -8, 7, jnp.int32) + ZERO).astype(jnp.uint8)
    return pack_integers(codes), {"block": scales.astype(jnp.bfloat16)}


def _encode_with_zero(values, group):
    """The rule of GPTQ and AWQ: scale = (max - min) / 15 of a range that holds 0, zero = round(-min / scale)."""
    n, k = values.shape[-2:]
    # A NaN is on both sides.
    least, most = (largest(jnp.where(sign * values <= 0, 0, values), (group, 1)) for sign in (-1, 1))
    scales = _bfloat16(divided(most / 2 + least / 2, 7.5))  # the sum of two large numbers would be infinite
    zero = _codes(divided(least, scales), 0, 15, jnp.uint8)
    steps = jnp.round(divided(values, spread(scales, (group, 1), n, k)))
    scaled = steps + spread(zero, (group, 1), n, k).astype(steps.dtype)
    return pack_integers(_codes(scaled, 0, 15, jnp.uint8)), {"block": scales.astype(jnp.bfloat16), "zero": zero}


def _decode_int4(codes, scales, dtype, group):
    n, k = codes.shape[-2], 2 * codes.shape[-1]
    zero = spread(scales["zero"], (group, 1), n, k).astype(jnp.int32) if "zero" in scales else ZERO
    steps = (unpack_integers(codes).astype(jnp.int32) - zero).astype(jnp.float32)
    return (steps * spread(scales["block"].astype(jnp.float32), (group, 1), n, k)).astype(dtype)


def _encode_int8(values):
    """The rule of FastDeploy's weight-only method: scale = amax / 127, codes -127 to 127."""
    scales = one_if_zero(divided(largest(values, (None, 1)), 127))
    return _codes(divided(values, scales), -127, 127, jnp.int8), {"channel": scales}


def _decode_int8(codes, scales, dtype):
    return (codes.astype(jnp.float32) * scales["channel"].astype(jnp.float32)).astype(dtype)


def _int4(group, suffix, encode):
    decode = functools.partial(_decode_int4, group=group)
    return Format(
        f"int4_{group}{suffix}",
        functools.partial(encode, group=group),
        decode,
        (group, 1),
        packing=2,
        group=GROUP,
        pack=pack_integers,
        unpack=unpack_integers,
    )


FORMATS = (
    *(_int4(group, "", _encode_symmetric) for group in (32, 128)),
    *(_int4(group, "_zero", _encode_with_zero) for group in (32, 128)),
    Format("int8", _encode_int8, _decode_int8, (None, 1)),
)
