"""Arguments that must be arrays of numbers. Each check raises an `InputError` with the name, the value and the rule."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe.errors import InputError

INT32 = np.iinfo(np.int32)


def given_numbers(name: str, value) -> Any:
    """The value as a JAX array, or as a NumPy array if it is not a JAX array.

    JAX cuts an integer of 64 bits to 32 bits unless jax_enable_x64 is set, so values are checked before that.

    Raises:
        InputError: NumPy makes no array of numbers of it.
    """
    if isinstance(value, jax.Array):
        array = value
    else:
        try:
            array = np.asarray(value)
        except (TypeError, ValueError):
            raise InputError(_NO_NUMBERS.format(name, type(value).__name__)) from None
    if not jnp.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise InputError(_NO_NUMBERS.format(name, type(value).__name__))
    return array


_NO_NUMBERS = "{} of type {} must be an array of numbers."


def as_numbers(name: str, value) -> jax.Array:
    """The value as an array of JAX.

    Raises:
        InputError: NumPy makes no array of numbers of it.
    """
    return jnp.asarray(given_numbers(name, value))


def check_fits_int32(name: str, values) -> None:
    """Refuses NumPy integers that JAX would cut to 32 bits.

    Raises:
        InputError: int32 cannot hold one of them.
    """
    if isinstance(values, np.ndarray) and values.size and values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if low < INT32.min or high > INT32.max:
            raise InputError(f"{name} between {low} and {high} must fit into int32.")


def typed_key(key) -> jax.Array:
    """The key as a typed JAX key; `jax.random.PRNGKey` makes an array of numbers.

    Raises:
        InputError: it is not one key.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.ndim == 1:
        with contextlib.suppress(TypeError, ValueError):  # its length differs from a key's
            return jax.random.wrap_key_data(jnp.asarray(key))
    what = f"shape {key.shape} and dtype {key.dtype}" if hasattr(key, "shape") else f"type {type(key).__name__}"
    raise InputError(f"key of {what} must be a single key, as jax.random.key(seed) makes it.")
