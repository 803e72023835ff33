"""Grouped matmul in plain XLA operations: runs on every device, differentiates by the caller's rules."""

import functools

import jax.numpy as jnp
from jax import custom_batching, lax
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import XlaBackend
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.xla.blocked import blocked_matmul, blocked_wgrad


class Xla:
    """The `xla` backend: see `XlaBackend` for its methods."""

    def __init__(self, config: XlaBackend):
        self.config = config

    def supports(self, problem) -> None:
        """Every problem: nothing here depends on shape, dtype or device."""
        del problem

    def tile(self, problem) -> None:
        """Nothing to choose from a table."""
        del problem

    def candidates(self, problem) -> tuple[()]:
        """Nothing to tune."""
        del problem
        return ()

    def matmul(self, rows, w, group_sizes, *, transpose_w):
        """See `Backend.matmul`."""
        rows, group_sizes = gathered(rows), _cut(group_sizes, rows.shape[0])
        if self.config.method == "ragged_dot":
            return _ragged_matmul(rows, w, group_sizes, transpose_w)
        return blocked_matmul(rows, w, group_sizes, transpose_w=transpose_w, block_rows=self.config.block_rows)

    def outer(self, rows, dout, group_sizes):
        """See `Backend.outer`."""
        rows, dout, group_sizes = gathered(rows), gathered(dout), _cut(group_sizes, rows.shape[0])
        if self.config.method == "ragged_dot":
            return _ragged_wgrad(rows, dout, group_sizes), rows, dout
        return blocked_wgrad(rows, dout, group_sizes, block_rows=self.config.block_rows), rows, dout


def _cut(group_sizes, num_rows) -> Int[Array, " e"]:
    """Sizes of at least 0 whose sum is at most num_rows, whatever int32 numbers are given."""
    sizes, experts = lax.clamp(0, group_sizes, num_rows), group_sizes.shape[0]
    if isinstance(num_rows, int) and num_rows * experts < 2**31:
        ends = jnp.minimum(jnp.cumsum(sizes), num_rows)
    else:  # the plain sum may pass int32: stop at num_rows in each addition
        ends = lax.associative_scan(lambda a, b: a + jnp.minimum(b, num_rows - a), sizes)
    return jnp.diff(ends, prepend=0)


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
    # Its own rule for vmap refuses operands of which only some are mapped: map one after the other.
    return custom_batching.sequential_vmap(dot)(left, right, group_sizes)


def _ragged_matmul(rows: Float[Array, "r a"], w, group_sizes, transpose_w):
    valid = _valid_rows(group_sizes, rows.shape[0])
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_w else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = _ragged_dot(dimensions, jnp.where(valid, rows, 0), w, group_sizes)
    return jnp.where(valid, out, 0).astype(rows.dtype)


def _ragged_wgrad(rows, dout, group_sizes):
    valid = _valid_rows(group_sizes, rows.shape[0])
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = _ragged_dot(dimensions, jnp.where(valid, rows, 0), jnp.where(valid, dout, 0), group_sizes)
    return out.astype(rows.dtype)
