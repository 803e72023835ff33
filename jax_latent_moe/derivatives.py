"""A guard for values whose derivative would be wrong."""

from functools import partial
from typing import Any

import jax

from jax_latent_moe.errors import InputError


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refused_if_differentiated(message: str, y: Any) -> Any:
    """Returns y. Differentiating it raises `InputError`."""
    del message
    return y


@refused_if_differentiated.defjvp
def _refuse(message, primals, tangents):
    raise InputError(message)
