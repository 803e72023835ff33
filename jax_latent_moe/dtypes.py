"""The type in which values of another type are added up."""

import jax.numpy as jnp


def at_least_float32(dtype) -> jnp.dtype:
    """float32 for narrower floating types, others as they are; no promotion, which strict modes refuse."""
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)
