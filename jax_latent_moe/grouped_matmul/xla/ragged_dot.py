"""Grouped matmul by `jax.lax.ragged_dot_general`: fast on TPUs, expanded to a dense matmul elsewhere."""

import functools

import jax.numpy as jnp
from jax import custom_batching, lax
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.dtypes import at_least_float32


def ragged_matmul(
    rows: Float[Array, "r a"], w: Float[Array, "e k n"], group_sizes: Int[Array, " e"], *, transpose_w: bool
) -> Float[Array, "r b"]:
    """Rows x w, or x w^T, in the dtype of rows; zeros beyond the sum of group_sizes, which is at most R."""
    valid = _valid_rows(group_sizes, rows.shape[0])
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_w else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = _ragged_dot(dimensions, jnp.where(valid, rows, 0), w, group_sizes)
    return jnp.where(valid, out, 0).astype(rows.dtype)


def ragged_wgrad(
    rows: Float[Array, "r k"], dout: Float[Array, "r n"], group_sizes: Int[Array, " e"]
) -> Float[Array, "e k n"]:
    """rows^T x dout in the dtype of rows."""
    valid = _valid_rows(group_sizes, rows.shape[0])
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = _ragged_dot(dimensions, jnp.where(valid, rows, 0), jnp.where(valid, dout, 0), group_sizes)
    return out.astype(rows.dtype)


def _accumulator(dtype):
    return at_least_float32(dtype)


def _valid_rows(group_sizes, num_rows) -> Bool[Array, "r 1"]:
    return (jnp.arange(num_rows) < jnp.sum(group_sizes))[:, None]


def _ragged_dot(dimensions, left, right, group_sizes):
    dot = functools.partial(
        lax.ragged_dot_general,
        ragged_dot_dimension_numbers=dimensions,
        preferred_element_type=_accumulator(left.dtype),
    )
    # JAX's vmap rule for it fails if only some operands are mapped, so the calls run one after the other.
    return custom_batching.sequential_vmap(dot)(left, right, group_sizes)
