"""`jax.lax.ragged_dot` on this library's backends: a mixture of experts in plain JAX gets the kernels by one import."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_latent_moe.arrays import as_numbers
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.errors import InputError
from jax_latent_moe.grouped_matmul import BackendConfig, grouped_matmul


def ragged_dot(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    precision: str | jax.lax.Precision | None = None,
    preferred_element_type: Any = None,
    group_offset: None = None,
    out_sharding: None = None,
    *,
    backend: str | BackendConfig = "auto",
) -> Float[Array, "m n"]:
    """`jax.lax.ragged_dot`: the rows of lhs are sorted by group, and each is multiplied by its group's matrix.

    It computes gradients of any order, and works under vmap over any arguments. It has no forward mode: `jax.jvp` and
    `jax.linearize` raise a TypeError, because its derivative is a `jax.custom_vjp`. Rows beyond sum(group_sizes) give
    zeros and have zero gradients, even if they hold NaN; `jax.lax.ragged_dot` leaves them undefined on some devices.

    Args:
        lhs: [m, k].
        rhs: [g, k, n], in the dtype of lhs.
        group_sizes: [g], the number of rows of each group. A concrete size must not be negative, nor the sum above m.
        precision: a `jax.lax.Precision` or its name, as in `jax.lax.dot`. It affects only float32 products in XLA.
        preferred_element_type: dtype of the result; None is the dtype of lhs. If it differs from lhs's, operands are
            multiplied in float32 (or float64), which the Hopper kernels do not do.
        group_offset: None. JAX does not say what another value means, and refuses it on CPUs and GPUs too.
        out_sharding: None.
        backend: "auto", a name or a backend dataclass, as in `grouped_matmul`.

    Returns:
        [m, n] in preferred_element_type, accumulated in float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes or group sizes do not fit, or an argument is not supported.
        UnsupportedError: the named backend cannot run this.
    """
    if group_offset is not None:
        raise InputError(
            f"group_offset={group_offset} must be None: slice group_sizes, rhs and the rows of lhs from that group on."
        )
    if out_sharding is not None:
        raise InputError(
            f"out_sharding={out_sharding} must be None: give the result to jax.lax.with_sharding_constraint."
        )
    lhs, rhs = as_numbers("lhs", lhs), as_numbers("rhs", rhs)
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise InputError(f"lhs of shape {lhs.shape} and rhs of shape {rhs.shape} must be [m, k] and [g, k, n].")
    if lhs.dtype != rhs.dtype:
        raise InputError(f"lhs of dtype {lhs.dtype} and rhs of dtype {rhs.dtype} must have the same: cast one first.")
    try:
        out = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    except TypeError:
        raise InputError(
            f"preferred_element_type={preferred_element_type!r} must be None or a floating dtype."
        ) from None
    if not jnp.issubdtype(lhs.dtype, jnp.floating) or not jnp.issubdtype(out, jnp.floating):
        raise InputError(f"operands of dtype {lhs.dtype} and a result of dtype {out} must both be floating.")
    if jax.dtypes.canonicalize_dtype(out) != out:
        raise InputError(f"preferred_element_type={out} needs JAX's 64-bit types: set jax_enable_x64.")
    if out != lhs.dtype:
        wide = max(at_least_float32(lhs.dtype), at_least_float32(out), key=lambda dtype: dtype.itemsize)
        lhs, rhs = lhs.astype(wide), rhs.astype(wide)
    product = grouped_matmul(lhs, rhs, group_sizes, precision=_precision(precision), backend=backend)
    return product.astype(out)


def _precision(given) -> jax.lax.Precision | None:
    if given is None:
        return None
    try:
        return jax.lax.Precision(given)
    except ValueError:
        raise InputError(
            f"precision={given!r} must be None, a jax.lax.Precision or its name, such as 'highest': algorithms and "
            "pairs are not supported."
        ) from None
