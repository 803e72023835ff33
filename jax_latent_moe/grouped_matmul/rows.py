"""Rows of a grouped matmul that stand anywhere in a table: named by their ids rather than gathered beforehand."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jax_latent_moe.grouped_matmul.device import default_device


class GatheredRows(NamedTuple):
    """The rows table[row_ids], [R, K]. Compiled kernels gather them while they multiply, other backends before.

    Attributes:
        table: [T, K].
        row_ids: [R] int32, which row of the table each row is; an id outside [0, T) takes the nearest row.
    """

    table: Float[Array, "t k"]
    row_ids: Int[Array, " r"]

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        return self.row_ids.shape[0], self.table.shape[1]

    @property
    def dtype(self):
        """That of the table."""
        return self.table.dtype


def gathered(rows: Float[Array, "r k"] | GatheredRows) -> Float[Array, "r k"]:
    """The rows themselves: gathered if they are not yet."""
    return take_rows(*rows) if isinstance(rows, GatheredRows) else rows


def take_rows(table: Float[Array, "t k"], row_ids: Int[Array, " r"]) -> Float[Array, "r k"]:
    """table[row_ids], each id moved into the table's bounds."""
    if not in_pairs(table):
        return _take(table, row_ids)
    pairs = _take(as_pairs(table), row_ids)
    return lax.bitcast_convert_type(pairs, table.dtype).reshape(-1, table.shape[1])


def in_pairs(table: Float[Array, "t k"]) -> bool:
    """Whether rows are better taken two elements at a time: XLA's kernel on a GPU has each thread move one."""
    return default_device()[0] == "gpu" and table.dtype == jnp.bfloat16 and table.shape[1] % 2 == 0


def as_pairs(table: Float[Array, "t k"]) -> UInt32[Array, "t half"]:
    """Two 16-bit elements as one number, the first in the lower half."""
    return lax.bitcast_convert_type(table.reshape(table.shape[0], -1, 2), jnp.uint32)


def _take(table, row_ids):
    return jnp.asarray(table).at[row_ids].get(mode="clip", wrap_negative_indices=False)
