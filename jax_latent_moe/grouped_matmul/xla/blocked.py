"""Grouped matmul in blocks of rows: each step is a batched product of some blocks with their experts' weights.

Cost and memory grow with the rows. Only the last block of an expert is padded, and only the weights of one step are
gathered at a time.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_latent_moe.device import Device
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.formats import ScaledArray, decoded
from jax_latent_moe.varying import varying


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes that were measured to be fast on one platform.

    Attributes:
        rows: the fewest and the most rows of a block.
        matmul_bytes: bytes of weights that one step of fwd or dgrad gathers.
        wgrad_bytes: bytes of float32 (or float64) products that one step of wgrad computes.
    """

    rows: tuple[int, int]
    matmul_bytes: int
    wgrad_bytes: int

    def block_rows(self, num_rows: int, num_experts: int) -> int:
        """Rows of a block: the largest power of two up to the mean group, within the bounds."""
        fewest, most = self.rows
        if not isinstance(num_rows, int):
            return fewest
        mean = max(num_rows // num_experts, 1)
        return min(max(1 << mean.bit_length() - 1, fewest), most)


# A step should stay in the cache on a CPU. On a GPU it should fill the chip and hide the launches.
_CPU = _Sizes(rows=(16, 128), matmul_bytes=2**19, wgrad_bytes=0)
_GPU = _Sizes(rows=(16, 256), matmul_bytes=2**26, wgrad_bytes=2**26)


def blocked_matmul(
    rows: Float[Array, "r a"],
    w: Float[Array, "e k n"] | ScaledArray,
    group_sizes: Int[Array, " e"],
    block_rows: int | None,
    device: Device,
    *,
    transpose_w: bool,
) -> Float[Array, "r b"]:
    """Rows x w, or x w^T, in the dtype of rows.

    Args:
        rows: [R, K], or [R, N] with transpose_w.
        w: [E, K, N]. A `ScaledArray` is decoded expert by expert.
        group_sizes: [E], at least 0, with a sum of at most R.
        block_rows: rows of a block; None picks a size for the device.
        device: the device that runs it.
        transpose_w: contract the last axis of w.
    """
    num_rows, num_experts = rows.shape[0], w.shape[0]
    out = jnp.zeros((num_rows, w.shape[1 if transpose_w else 2]), rows.dtype)
    if out.size == 0 or num_experts == 0:
        return out
    step_bytes = w.shape[1] * w.shape[2] * rows.dtype.itemsize
    sizes = _sizes(device)
    steps = _steps(
        group_sizes,
        num_rows,
        block_rows or sizes.block_rows(num_rows, num_experts),
        _blocks(sizes.matmul_bytes, step_bytes),
    )
    contracted = ((2,), (2 if transpose_w else 1,))

    def step(out, blocks):
        expert, row = blocks
        product = lax.dot_general(
            _rows_or_zero(rows, row),
            decoded(w[expert], rows.dtype),
            (contracted, ((0,), (0,))),
            preferred_element_type=_wide(rows.dtype),
        )
        return out.at[row].set(product.astype(out.dtype), mode="drop", unique_indices=True), None

    return lax.scan(step, varying(out, rows, w, group_sizes), steps)[0]


def blocked_wgrad(
    rows: Float[Array, "r k"],
    dout: Float[Array, "r n"],
    group_sizes: Int[Array, " e"],
    block_rows: int | None,
    device: Device,
) -> Float[Array, "e k n"]:
    """rows^T x dout in the dtype of rows; see `blocked_matmul` for the arguments."""
    num_rows, num_experts = rows.shape[0], group_sizes.shape[0]
    out = jnp.zeros((num_experts, rows.shape[1], dout.shape[1]), rows.dtype)
    if out.size == 0 or num_rows == 0:
        return out
    wide = _wide(rows.dtype)
    step_bytes = out[0].size * wide.itemsize
    sizes = _sizes(device)
    steps = _steps(
        group_sizes,
        num_rows,
        block_rows or sizes.block_rows(num_rows, num_experts),
        _blocks(sizes.wgrad_bytes, step_bytes),
    )

    def step(carry, blocks):
        out, total, last_expert = carry
        expert, row = blocks
        product = lax.dot_general(
            _rows_or_zero(rows, row),
            _rows_or_zero(dout, row),
            (((1,), (1,)), ((0,), (0,))),
            preferred_element_type=wide,
        )
        # Blocks are in the order of the experts, so only the first can continue the last expert of the previous step.
        product = product.at[0].add(jnp.where(expert[0] == last_expert, total, 0))
        changes = expert[1:] != expert[:-1]
        first, last = jnp.append(True, changes), jnp.append(changes, True)
        product = lax.associative_scan(_sum_within_expert, (first[:, None, None], product))[1]
        place = jnp.where(last, expert, num_experts + jnp.arange(len(expert), dtype=jnp.int32))
        out = out.at[place].set(product.astype(out.dtype), mode="drop", unique_indices=True)
        return (out, product[-1], expert[-1]), None

    carry = (out, jnp.zeros(out.shape[1:], wide), jnp.full((), -1, jnp.int32))
    return lax.scan(step, varying(carry, rows, dout, group_sizes), steps)[0][0]


def _sum_within_expert(left, right):
    """A running sum that restarts at each expert. Multiplying by 0 instead would spread an expert's NaN to others."""
    (left_starts, left_sum), (right_starts, right_sum) = left, right
    return left_starts | right_starts, jnp.where(right_starts, right_sum, left_sum + right_sum)


def _steps(
    group_sizes: Int[Array, " e"], num_rows: int, block_rows: int, blocks: int
) -> tuple[Int[Array, "steps blocks"], Int[Array, "steps blocks size"]]:
    """The expert and the row indices of each block. Padding has indices beyond the last row.

    The number of blocks is enough for all group sizes: ceil(n / size) per expert adds up to at most
    (rows + (number of experts with rows) * (size - 1)) / size.
    """
    num_experts = group_sizes.shape[0]
    if isinstance(num_rows, int):
        size = min(block_rows, num_rows)
        needed = (num_rows + min(num_experts, num_rows) * (size - 1)) // size
        blocks = min(blocks, needed)
    else:  # a symbolic size of jax.export has no order: blocks as for few rows
        size = block_rows
        needed = (num_rows + num_experts * (size - 1)) // size
    steps = -(-needed // blocks)

    ends = jnp.cumsum(group_sizes)
    blocks_of = -(-group_sizes // size)
    last_block = jnp.cumsum(blocks_of)
    block = jnp.arange(steps * blocks, dtype=jnp.int32)
    expert = jnp.searchsorted(last_block, block, side="right").astype(jnp.int32)
    real = expert < num_experts
    expert = jnp.minimum(expert, num_experts - 1)
    start = ends[expert] - group_sizes[expert] + (block - (last_block - blocks_of)[expert]) * size
    row = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    # The indices beyond the rows are distinct, because unique_indices promises that all are.
    beyond = num_rows + jnp.arange(row.size, dtype=jnp.int32).reshape(row.shape)
    row = jnp.where(real[:, None] & (row < ends[expert][:, None]), row, beyond)
    return expert.reshape(steps, blocks), row.reshape(steps, blocks, size)


def _blocks(budget: int, step_bytes: int) -> int:
    """Blocks of one step. Symbolic features of jax.export have no order: then a step has one block."""
    return max(budget // max(step_bytes, 1), 1) if isinstance(step_bytes, int) else 1


def _sizes(device: Device) -> _Sizes:
    return _CPU if device.platform == "cpu" else _GPU


def _rows_or_zero(rows, indices):
    return rows.at[indices].get(mode="fill", fill_value=0)


def _wide(dtype) -> jnp.dtype:
    return at_least_float32(dtype)
