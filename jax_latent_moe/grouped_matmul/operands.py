"""Rows of a grouped matmul that stand anywhere in a table: named by their ids rather than gathered beforehand."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jax_latent_moe.device import default_device
from jax_latent_moe.dtypes import at_least_float32


class GatheredRows(NamedTuple):
    """The rows table[row_ids], [R, K], perhaps weighted. Compiled kernels gather them while they multiply.

    Attributes:
        table: [T, K].
        row_ids: [R] int32, which row of the table each row is; an id outside [0, T) takes the nearest row.
        weights: [R], what each row is multiplied by, in float32, before it is rounded to the table's type; or None.
    """

    table: Float[Array, "t k"]
    row_ids: Int[Array, " r"]
    weights: Float[Array, " r"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        return self.row_ids.shape[0], self.table.shape[1]

    @property
    def dtype(self):
        """That of the table."""
        return self.table.dtype


class LastColumns(NamedTuple):
    """The last columns of wider rows, [R, K], which compiled kernels read where they stand. No argument of a jit.

    Attributes:
        matrix: [R, C].
        width: K.
    """

    matrix: Float[Array, "r c"]
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        return self.matrix.shape[0], self.width

    @property
    def dtype(self):
        """That of the matrix."""
        return self.matrix.dtype


def gathered(rows: Float[Array, "r k"] | GatheredRows | LastColumns) -> Float[Array, "r k"]:
    """The rows themselves: gathered or cut out if they are not yet. Has no derivative: see `scattered`."""
    if isinstance(rows, LastColumns):
        return rows.matrix[:, rows.matrix.shape[1] - rows.width :]
    if not isinstance(rows, GatheredRows):
        return rows
    table, row_ids, weights = rows
    # XLA's kernel on a GPU has each thread move one element: it moves two as one number in half the time.
    if default_device()[0] == "gpu" and table.dtype == jnp.bfloat16 and table.shape[1] % 2 == 0:
        pairs = _take(lax.bitcast_convert_type(table.reshape(table.shape[0], -1, 2), jnp.uint32), row_ids)
        pairs = pairs if weights is None else _times(pairs, weights[:, None])
        return lax.bitcast_convert_type(pairs, table.dtype).reshape(-1, table.shape[1])
    taken = _take(table, row_ids)
    return taken if weights is None else _weigh(taken, weights).astype(table.dtype)


def scattered(rows: GatheredRows, drows: Float[Array, "r k"]) -> GatheredRows:
    """The gradients of table and weights from that of the rows; sums run in the wider of float32 and the rows' type."""
    table, row_ids, weights = rows
    parts = drows.astype(_wide(drows)) if weights is None else _weigh(drows, weights)
    nearest = jnp.clip(row_ids, 0, table.shape[0] - 1)
    dtable = jnp.zeros(table.shape, parts.dtype).at[nearest].add(parts).astype(table.dtype)
    if weights is None:
        return rows._replace(table=dtable, row_ids=None)
    products = drows.astype(parts.dtype) * _take(table, row_ids).astype(parts.dtype)
    return rows._replace(table=dtable, row_ids=None, weights=jnp.sum(products, axis=1).astype(weights.dtype))


def _weigh(rows, weights):
    return weights[:, None].astype(_wide(rows)) * rows.astype(_wide(rows))


def _wide(rows):
    return at_least_float32(rows.dtype)


def _times(pairs: UInt32[Array, "r half"], weights: Float[Array, "r 1"]) -> UInt32[Array, "r half"]:
    """Pairs of bfloat16 times weights. A bfloat16 is the upper half of a float32."""
    halves = (lax.bitcast_convert_type(half, jnp.float32) for half in (pairs << 16, pairs & jnp.uint32(0xFFFF0000)))
    products = ((weights.astype(jnp.float32) * half).astype(jnp.bfloat16) for half in halves)
    low, high = (lax.bitcast_convert_type(product, jnp.uint16).astype(jnp.uint32) for product in products)
    return low | high << 16


def _take(table, row_ids):
    return jnp.asarray(table).at[row_ids].get(mode="clip", wrap_negative_indices=False)
