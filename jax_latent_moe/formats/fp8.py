"""FP8 weights: E4M3 codes with scales for blocks of 128 x 128, for a matrix, or for its output channels.

E4M3 is defined by OCP 8-bit Floating Point 1.0: it has no infinity, and 448 is its largest number. A value is rounded
to the nearest code, ties to even. Codes are stored as bytes, because JAX gives a leaf of a float8 dtype a gradient.

A block with NaN or infinity decodes to NaN.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from jax_latent_moe.formats.blocks import Block, divided, largest, one_if_zero, spread
from jax_latent_moe.formats.registry import Format

LARGEST = 448.0
LEAST = 1e-4
"""The least amax of a block of a weight, as in DeepGEMM."""
LEAST_OF_ROWS = 1e-30
"""The least amax of a block of rows. Gradients may be far below DeepGEMM's 1e-4; here 448 / amax stays finite."""
BLOCK = 128


def to_e4m3(values: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The bytes of the nearest E4M3 numbers; NaN beyond 464."""
    codes = lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)
    # XLA for GPUs removes a conversion to fewer bits and back. The barrier keeps the rounding.
    return lax.optimization_barrier(codes)


def from_e4m3(codes: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """The float32 values of E4M3 bytes."""
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def power_of_two_above(values: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The least power of two that is not below each positive value; infinity and NaN stay."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    power = lax.bitcast_convert_type(jnp.clip(exponent, 1, 254) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(values), power, values)


def encode_blocks(
    values: Float[Array, "*e n k"], block: Block = (BLOCK, BLOCK), *, power_of_two: bool = False, least: float = LEAST
) -> tuple[UInt8[Array, "*e n k"], dict[str, Float[Array, "*e nb kb"]]]:
    """Block FP8 as in DeepGEMM (deep_gemm/utils/math.py): scale = max(amax, 1e-4) / 448, code = value * (1 / scale).

    Args:
        values: [..., N, K] in float32; the last blocks may be partial.
        block: (K, N) elements that share a scale.
        power_of_two: round scales up to powers of two, as TransformerEngine does by default.
        least: the least amax, used for smaller ones.
    """
    scales = divided(jnp.maximum(largest(values, block), least), LARGEST)
    scales = power_of_two_above(scales) if power_of_two else scales
    # Without the barrier, XLA turns 1 / (amax / 448) into 448 / amax, which may be rounded to the other neighbour.
    scales = lax.optimization_barrier(scales)
    codes = to_e4m3(values * spread(1 / scales, block, *values.shape[-2:]))
    return codes, {"block": scales}


def decode_blocks(codes, scales, dtype, block: Block = (BLOCK, BLOCK)) -> Float[Array, "*e n k"]:
    """The values of `encode_blocks`: code times scale, rounded to float32 and then to dtype."""
    return (from_e4m3(codes) * spread(wide_scales(scales), block, *codes.shape[-2:])).astype(dtype)


def wide_scales(scales) -> Float[Array, "*e nb kb"]:
    """The scales of blocks in float32, from another floating type or from E8M0 bytes.

    The byte u is 2^(u - 127), and 255 is NaN.
    """
    wide = scales["block"]
    if wide.dtype == jnp.uint8:
        power = lax.bitcast_convert_type(jnp.maximum(wide.astype(jnp.int32) << 23, 1 << 22), jnp.float32)
        wide = jnp.where(wide == 255, jnp.nan, power)
    return wide.astype(jnp.float32)


def encode_rows(
    rows: Float[Array, "*e r k"], *, power_of_two: bool = False
) -> tuple[UInt8[Array, "*e r k"], dict[str, Float[Array, "*e r kb"]]]:
    """Rows of tokens in blocks of 1 x 128 along K, by the rule of `encode_blocks` with a smaller least amax."""
    return encode_blocks(rows.astype(jnp.float32), (BLOCK, 1), power_of_two=power_of_two, least=LEAST_OF_ROWS)


def decode_rows(codes: UInt8[Array, "*e r k"], scales: dict[str, Array], dtype) -> Float[Array, "*e r k"]:
    """The values of `encode_rows`."""
    return decode_blocks(codes, scales, dtype, (BLOCK, 1))


def _encode_whole(values, block, name):
    """ModelOpt's rule: scale = amax / 448, code = value / scale; scale 1 if all values are 0."""
    scales = one_if_zero(divided(largest(values, block), LARGEST))
    return to_e4m3(divided(values, scales)), {name: scales}


def _decode_whole(codes, scales, dtype, name):
    return (from_e4m3(codes) * scales[name].astype(jnp.float32)).astype(dtype)


def _whole(format_name, block, scale_name):
    encode = functools.partial(_encode_whole, block=block, name=scale_name)
    return Format(format_name, encode, functools.partial(_decode_whole, name=scale_name), block)


def _block_format(name, power_of_two):
    settings = {"power_of_two": power_of_two}
    return Format(
        name,
        functools.partial(encode_blocks, **settings),
        decode_blocks,
        (BLOCK, BLOCK),
        partial_blocks=True,
        encode_rows=functools.partial(encode_rows, **settings),
        decode_rows=decode_rows,
    )


FORMATS = (
    _block_format("fp8_block", power_of_two=False),
    _block_format("fp8_block_pow2", power_of_two=True),
    # A checkpoint's static scale of the inputs is kept beside the scale as "input". No product uses it: inputs are
    # scaled by their own values.
    _whole("fp8_tensor", (None, None), "tensor"),
    _whole("fp8_channel", (None, 1), "channel"),
)
