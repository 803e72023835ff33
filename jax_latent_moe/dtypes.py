"""The type in which sums of narrow types are computed."""

import jax.numpy as jnp


def at_least_float32(dtype) -> jnp.dtype:
    """float32 for narrower floating types, else the type itself. Strict promotion allows it: no types are mixed."""
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)
