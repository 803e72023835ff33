"""The first and last row of each expert, for any group sizes: they cannot be checked under jit."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def group_ends(group_sizes: Int[Array, " e"], num_rows: int) -> Int[Array, " e"]:
    """The end of each group. A negative size counts as 0, and groups are cut at the last row.

    Args:
        group_sizes: [E] int32, any values.
        num_rows: R; symbolic under `jax.export`.

    Returns:
        [E] int32, at most R and in ascending order.
    """
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, num_rows)
    if isinstance(num_rows, int) and sizes.shape[0] * num_rows < 2**31:
        return jnp.minimum(jnp.cumsum(sizes), num_rows)
    # The sum can pass 2^31. Each partial sum is therefore cut to num_rows, and two of those add up within uint32.
    most = jnp.asarray(num_rows, jnp.uint32)
    ends = lax.associative_scan(lambda left, right: jnp.minimum(left + right, most), sizes.astype(jnp.uint32))
    return ends.astype(jnp.int32)
