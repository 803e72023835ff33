"""Grouped matmul in plain XLA operations: runs on every device, differentiates by the caller's rules."""

import functools

import jax.numpy as jnp
from jax import custom_batching, lax
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import XlaBackend

# Below 16 rows a CPU block is bound by reading its weight, above 128 by the rows that pad the last block.
MIN_BLOCK, MAX_BLOCK = 16, 128


class Xla:
    """The `xla` backend: see `XlaBackend` for its methods."""

    def __init__(self, config: XlaBackend):
        self.config = config

    def supports(self, problem) -> None:
        """Every problem: nothing here depends on shape, dtype or device."""
        del problem

    def matmul(self, rows, w, group_sizes, *, transpose_w):
        """See `Backend.matmul`."""
        if self.config.method == "ragged_dot":
            return _ragged_matmul(rows, w, group_sizes, transpose_w)
        return _blocked_matmul(rows, w, group_sizes, transpose_w, self._block(rows, group_sizes))

    def outer(self, rows, dout, group_sizes):
        """See `Backend.outer`."""
        if self.config.method == "ragged_dot":
            return _ragged_outer(rows, dout, group_sizes)
        return _blocked_outer(rows, dout, group_sizes, self._block(rows, group_sizes))

    def _block(self, rows, group_sizes) -> int:
        """Rows per block: a power of two near the mean group, never more than there are rows."""
        mean = rows.shape[0] // max(group_sizes.shape[0], 1)
        block = self.config.block_rows or min(max(1 << mean.bit_length() - 1 if mean else 1, MIN_BLOCK), MAX_BLOCK)
        return min(block, rows.shape[0])


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


class _Blocks:
    """Consecutive runs of at most `size` rows, none of which crosses an expert; only experts with rows have any."""

    def __init__(self, group_sizes: Int[Array, " e"], num_rows: int, size: int):
        self.size, self.num_rows = size, num_rows
        self.ends = jnp.cumsum(group_sizes)
        self.starts = self.ends - group_sizes
        blocks = -(-group_sizes // size)
        self.last = jnp.cumsum(blocks)
        self.first = self.last - blocks
        self.count = self.last[-1]

    def at(self, i) -> tuple[Array, Array, Array, Bool[Array, "size 1"]]:
        """Expert of block i, whether it is the expert's first, row to slice from, and which sliced rows belong."""
        expert = jnp.sum(self.last <= i)
        start = self.starts[expert] + (i - self.first[expert]) * self.size
        # The last rows have no full block after `start`: slice earlier and let the mask drop the others' rows.
        slice_from = jnp.minimum(start, self.num_rows - self.size)
        row = slice_from + jnp.arange(self.size)
        mine = (row >= start) & (row < self.ends[expert])
        return expert, i == self.first[expert], slice_from, mine[:, None]


def _blocked_matmul(rows, w, group_sizes, transpose_w, block):
    out = jnp.zeros((rows.shape[0], w.shape[1 if transpose_w else 2]), rows.dtype)
    if out.size == 0 or w.shape[0] == 0:
        return out
    blocks = _Blocks(group_sizes, rows.shape[0], block)
    contracted = ((1,), (1 if transpose_w else 0,))

    def step(i, out):
        expert, _, start, mine = blocks.at(i)
        part = lax.dot_general(
            lax.dynamic_slice_in_dim(rows, start, block),
            lax.dynamic_index_in_dim(w, expert, keepdims=False),
            (contracted, ((), ())),
            preferred_element_type=_accumulator(rows.dtype),
        )
        part = jnp.where(mine, part.astype(out.dtype), lax.dynamic_slice_in_dim(out, start, block))
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    return lax.fori_loop(0, blocks.count, step, out)


def _blocked_outer(rows, dout, group_sizes, block):
    shape = (group_sizes.shape[0], rows.shape[1], dout.shape[1])
    out = jnp.zeros(shape, rows.dtype)
    if out.size == 0 or rows.shape[0] == 0:
        return out
    blocks = _Blocks(group_sizes, rows.shape[0], block)
    wide = _accumulator(rows.dtype)

    def step(i, carry):
        out, total = carry
        expert, first, start, mine = blocks.at(i)
        part = lax.dot_general(
            jnp.where(mine, lax.dynamic_slice_in_dim(rows, start, block), 0),
            jnp.where(mine, lax.dynamic_slice_in_dim(dout, start, block), 0),
            (((0,), (0,)), ((), ())),
            preferred_element_type=wide,
        )
        # The running sum stays wide in a carry of one expert: `out` would round it at every block.
        total = jnp.where(first, part, total + part)
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), expert, 0), total

    return lax.fori_loop(0, blocks.count, step, (out, jnp.zeros(shape[1:], wide)))[0]


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


def _ragged_outer(rows, dout, group_sizes):
    valid = _valid_rows(group_sizes, rows.shape[0])
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = _ragged_dot(dimensions, jnp.where(valid, rows, 0), jnp.where(valid, dout, 0), group_sizes)
    return out.astype(rows.dtype)
