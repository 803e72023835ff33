"""A compiled kernel that encodes a weight in two layouts: for forward products and for input gradients."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe import native
from jax_latent_moe.formats.fp8 import BLOCK
from jax_latent_moe.formats.scaled_array import ScaledArray

POWER_OF_TWO = {"fp8_block": False, "fp8_block_pow2": True}
"""The formats that the kernel encodes, and whether their scales are powers of two."""
WIDE = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))
"""The dtypes that it encodes."""


def kernel_encodes(weight: Float[Array, "*e k n"], format: str, parts: int) -> bool:
    """Whether the compiled kernel encodes a weight with `parts` matrices side by side. Blocks must be whole."""
    *leading, k, n = weight.shape
    blocks = math.prod(leading) * (k // BLOCK) * (n // BLOCK)
    whole = k % BLOCK == 0 and n % (parts * BLOCK) == 0
    return whole and 0 < blocks < 2**31 and format in POWER_OF_TWO and weight.dtype in WIDE


def encode_both(weight: Float[Array, "*e k n"], format: str, parts: int) -> tuple[ScaledArray, ScaledArray]:
    """The codes of a weight and of its transpose, in one pass over the weight (custom_calls/src/formats).

    Args:
        weight: [..., K, P * N], one that `kernel_encodes`.
        format: a key of `POWER_OF_TWO`.
        parts: P, the number of matrices whose columns lie side by side.

    Returns:
        The results of `encode(weight, format, parts=parts)` and `encode(swapaxes(weight, -1, -2), format)`.
    """
    *leading, k, n = weight.shape
    matrices, own = math.prod(leading), n // parts
    results = [
        jax.ShapeDtypeStruct((matrices, k, n), jnp.uint8),
        jax.ShapeDtypeStruct((matrices, n, k), jnp.uint8),
        jax.ShapeDtypeStruct((matrices, k // BLOCK, n // BLOCK), jnp.float32),
    ]
    flat = weight.reshape(matrices, k, n)
    codes, across, scales = native.call("encode_blocks", [flat], results, power_of_two=POWER_OF_TWO[format])
    of_across = jnp.swapaxes(scales, 1, 2).reshape(*leading, parts, own // BLOCK, k // BLOCK)
    of_codes = scales.reshape(*leading, 1, k // BLOCK, n // BLOCK)
    return (
        ScaledArray(across.reshape(*leading, parts, own, k), {"block": of_across}, format),
        ScaledArray(codes.reshape(*leading, 1, k, n), {"block": of_codes}, format),
    )
