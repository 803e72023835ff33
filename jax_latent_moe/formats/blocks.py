"""Blocks of matrices [..., N, K] that share a scale."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Block = tuple[int | None, int | None]


def in_blocks(values: Float[Array, "*e n k"], block: Block) -> Float[Array, "*e nb bn kb bk"]:
    """The values by blocks of (K, N) elements; None stands for the whole axis. A partial block is filled with 0."""
    *lead, n, k = values.shape
    # A whole axis is one block, even without elements.
    (k_block, k_blocks), (n_block, n_blocks) = (
        (size, 1) if part is None else (part, -(-size // part)) for size, part in zip((k, n), block, strict=True)
    )
    padding = [(0, 0)] * len(lead) + [(0, n_blocks * n_block - n), (0, k_blocks * k_block - k)]
    return jnp.pad(values, padding).reshape(*lead, n_blocks, n_block, k_blocks, k_block)


def largest(values: Float[Array, "*e n k"], block: Block) -> Float[Array, "*e nb kb"]:
    """The largest magnitude of each block, NaN or infinite if one of its values is, and 0 without values."""
    # Magnitudes are compared as integers: XLA's maximum over several axes of a CPU may lose a NaN.
    bits = lax.bitcast_convert_type(jnp.abs(in_blocks(values, block)), jnp.int32)
    return lax.bitcast_convert_type(jnp.max(bits, axis=(-3, -1), initial=0), jnp.float32)


def spread(scales: Array, block: Block, n: int, k: int) -> Array:
    """The scale of each element: [..., N, K], or with an axis of size 1 where all elements share it."""
    for axis, size, length in ((-2, block[1], n), (-1, block[0], k)):
        if size is not None and size > 1 and scales.shape[axis] > 1:
            scales = lax.slice_in_dim(jnp.repeat(scales, size, axis), 0, length, axis=axis)
    return scales


def one_if_zero(scales: Array) -> Array:
    """The scales, with 1 for a block of zeros: a scale of 0 would divide 0 by 0."""
    return jnp.where(scales == 0, 1, scales)


def divided(values: Array, by: Any) -> Array:
    """The quotient, correctly rounded.

    XLA would multiply by the rounded reciprocal of a divisor that it sees to be a constant or broadcast.
    """
    return values / jnp.where(jnp.isnan(values), jnp.nan, by)
