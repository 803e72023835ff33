"""4-bit floating-point weights: E2M1 codes with a scale for each 32 (MXFP4) or 16 (NVFP4) along K.

E2M1 is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. A value is rounded to the nearest, ties to the even code, and
larger ones become 6. `packing` says where a code is.

A block with NaN or infinity decodes to NaN; in NVFP4, whose matrices have a scale too, the whole matrix does.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from jax_latent_moe.formats.blocks import divided, largest, one_if_zero, spread
from jax_latent_moe.formats.fp8 import LARGEST as E4M3_LARGEST
from jax_latent_moe.formats.fp8 import from_e4m3, to_e4m3
from jax_latent_moe.formats.packing import GROUP, pack_e2m1, unpack_e2m1
from jax_latent_moe.formats.registry import Format

LARGEST = 6.0
MX_BLOCK, NV_BLOCK = (32, 1), (16, 1)


def to_e2m1(values: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The codes of the nearest E2M1 numbers; 0 for NaN."""
    size = jnp.minimum(jnp.where(jnp.isnan(values), 0, jnp.abs(values)), LARGEST)
    # Steps are 0.5 below 2, 1 below 4 and 2 above. Each step is the next code, so ties go to even codes.
    code = jnp.where(
        size < 2, jnp.round(2 * size), jnp.where(size < 4, 2 + jnp.round(size), 4 + jnp.round(size / 2))
    ).astype(jnp.uint8)
    return code | jnp.signbit(values).astype(jnp.uint8) << 3


def from_e2m1(codes: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """The float32 values of E2M1 codes."""
    bits = codes.astype(jnp.uint32)
    exponent, mantissa = bits >> 1 & 3, bits & 1
    normal = exponent + 126 << 23 | mantissa << 22
    size = jnp.where(exponent > 0, normal, mantissa * jnp.uint32(126 << 23))
    return lax.bitcast_convert_type(bits >> 3 << 31 | size, jnp.float32)


def _encode_mxfp4(values):
    """OCP Microscaling Formats 1.0, section 6.3: the scale is 2^(floor(log2(amax)) - 2), at least 2^-127."""
    biased = lax.bitcast_convert_type(largest(values, MX_BLOCK), jnp.int32) >> 23
    exponent = jnp.where(biased == 255, 255, jnp.maximum(biased - 2, 0))
    inverse = lax.bitcast_convert_type(jnp.maximum(254 - exponent, 0) << 23, jnp.float32)
    scaled = values * spread(inverse, MX_BLOCK, *values.shape[-2:])
    return pack_e2m1(to_e2m1(scaled)), {"block": exponent.astype(jnp.uint8)}


def _decode_mxfp4(codes, scales, dtype):
    exponent = scales["block"].astype(jnp.int32)
    # 2^-127 is subnormal, and some devices read it as 0: small powers are doubled, and the codes halved.
    small = exponent < 128
    power = lax.bitcast_convert_type(exponent + small.astype(jnp.int32) << 23, jnp.float32)
    power = jnp.where(exponent == 255, jnp.nan, power)
    n, k = codes.shape[-2], 2 * codes.shape[-1]
    halved = spread(jnp.where(small, jnp.float32(0.5), 1), MX_BLOCK, n, k)
    return (from_e2m1(unpack_e2m1(codes)) * halved * spread(power, MX_BLOCK, n, k)).astype(dtype)


def _encode_nvfp4(values):
    """ModelOpt's rule (NVFP4QTensor): matrix scale amax / (6 * 448), block scale amax / (6 * matrix scale) in E4M3."""
    tensor = one_if_zero(divided(largest(values, (None, None)), LARGEST * E4M3_LARGEST))
    block = to_e4m3(one_if_zero(divided(largest(values, NV_BLOCK), LARGEST * tensor)))
    divisor = spread(from_e4m3(block) * tensor, NV_BLOCK, *values.shape[-2:])
    # A block far below the largest has a scale that rounds to 0: its values are 0.
    scaled = jnp.where(divisor == 0, 0, divided(values, divisor))
    return pack_e2m1(to_e2m1(scaled)), {"block": block, "tensor": tensor}


def _decode_nvfp4(codes, scales, dtype):
    """Code times block scale, which is exact, times the matrix scale, rounded to float32 and then to dtype."""
    blocks = spread(from_e4m3(scales["block"]), NV_BLOCK, codes.shape[-2], 2 * codes.shape[-1])
    return (from_e2m1(unpack_e2m1(codes)) * blocks * scales["tensor"].astype(jnp.float32)).astype(dtype)


_PACKING: Any = {"packing": 2, "group": GROUP, "pack": pack_e2m1, "unpack": unpack_e2m1}
FORMATS = (
    Format("mxfp4", _encode_mxfp4, _decode_mxfp4, MX_BLOCK, **_PACKING),
    Format("nvfp4", _encode_nvfp4, _decode_nvfp4, NV_BLOCK, **_PACKING),
)
