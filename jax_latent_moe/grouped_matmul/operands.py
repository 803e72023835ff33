"""Operands and results of a grouped matmul, and rows that a kernel may gather or cut out of wider rows itself."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jax_latent_moe.device import Device, current_device
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.formats import ScaledArray, ScaledRows, format_of
from jax_latent_moe.grouped_matmul.problem import Operand


class GatheredRows(NamedTuple):
    """The rows table[row_ids], [R, K], optionally times weights. Some kernels gather them while they multiply.

    Attributes:
        table: [T, K], an array or `ScaledRows`: a token is encoded once, however many experts it has.
        row_ids: [R] int32, the row of the table that each row is. An id outside [0, T) takes the nearest row.
        weights: [R], or None. It must be None if the table is `ScaledRows`. Each row is multiplied by its weight in
            float32, then rounded to the table's dtype.
    """

    table: Float[Array, "t k"] | ScaledRows
    row_ids: Int[Array, " r"]
    weights: Float[Array, " r"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        return self.row_ids.shape[0], self.table.shape[1]

    @property
    def dtype(self):
        """The table's dtype."""
        return self.table.dtype


class LastColumns(NamedTuple):
    """The last columns of wider rows, [R, K]. Some kernels read them in place. A jitted function cannot take it.

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
        """The matrix's dtype."""
        return self.matrix.dtype


class Operands(NamedTuple):
    """The inputs of one product. The last two are for an epilogue with a gradient.

    Attributes:
        lhs: rows [R, K] of fwd and wgrad, [R, N] of dgrad.
        rhs: the weight [E, K, N] of fwd and dgrad, rows [R, N] of wgrad. A dgrad whose epilogue encodes takes the
            `ScaledArray` of the transposed weight [E, N, K].
        group_sizes: [E] int32.
        residual: the activation's residual from the forward pass, [R, K] or [R, 2 K].
        row_weights: the factor of each row's gradient, [R].
    """

    lhs: Any
    rhs: Any
    group_sizes: Int[Array, " e"]
    residual: Float[Array, "r p"] | None = None
    row_weights: Float[Array, " r"] | None = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The results of one product. A field that the product does not have is None.

    An epilogue is a value (the activation, in fwd) or a gradient (of the activation, in dgrad).

    Attributes:
        out: the product: [R, N], [R, K] or [E, K, N]. With a value in the epilogue, the hidden rows, which are
            `ScaledRows` if the epilogue encodes them. With a gradient in the epilogue, the gradient of the
            pre-activation times row_weights.
        residual: with a value in the epilogue, the activation's residual.
        hidden: with a gradient in the epilogue that reads the pre-activation, hidden rows times row_weights.
        row_weight_gradients: with a gradient in the epilogue, <dhidden, hidden> of each row, [R] float32.
        lhs: the left operand as a dense array or as `LastColumns`. A kernel that gathers rows returns them here.
        rhs: the right operand, in the same way.
        codes: the gradient in out as codes, if the same kernel encoded it.
    """

    out: Any
    residual: Float[Array, "r p"] | None = None
    hidden: Float[Array, "r m"] | None = None
    row_weight_gradients: Float[Array, " r"] | None = None
    lhs: Any = None
    rhs: Any = None
    codes: ScaledRows | None = None


def operand_of(array: Array | ScaledArray | ScaledRows | GatheredRows | LastColumns) -> Operand:
    """The format and layout of an array, for a `Problem`."""
    if isinstance(array, GatheredRows):
        return Operand(format_of(array.table), "gathered")
    if isinstance(array, LastColumns):
        return Operand(format_of(array.matrix), "columns")
    return Operand(format_of(array))


def gathered(rows: Float[Array, "r k"] | ScaledRows | GatheredRows | LastColumns, device: Device | None = None) -> Any:
    """The rows [R, K] as a dense array, or as `ScaledRows` if the table is in codes.

    It is not to be differentiated by JAX: `scattered` computes its gradient.

    Args:
        rows: rows of a table, columns of wider rows, or dense rows, which are returned as they are.
        device: the device that gathers them; None is JAX's default device.
    """
    if isinstance(rows, LastColumns):
        return rows.matrix[:, rows.matrix.shape[1] - rows.width :]
    if not isinstance(rows, GatheredRows):
        return rows
    table, row_ids, weights = rows
    platform = (device or current_device()).platform
    # XLA's gather on a GPU moves one element per thread: two bfloat16 in one 32-bit number take half the time.
    if isinstance(table, ScaledRows):
        width = table.shape[1]
        if platform != "gpu" or table.codes.dtype != jnp.uint8 or width % 4:
            return table.take(row_ids)
        words = lax.bitcast_convert_type(table.codes.reshape(-1, width // 4, 4), jnp.uint32)
        taken = dataclasses.replace(table, codes=words).take(row_ids)
        codes = lax.bitcast_convert_type(taken.codes, jnp.uint8).reshape(-1, width)
        return dataclasses.replace(taken, codes=codes)
    if platform == "gpu" and table.dtype == jnp.bfloat16 and table.shape[1] % 2 == 0:
        pairs = _take(lax.bitcast_convert_type(table.reshape(table.shape[0], -1, 2), jnp.uint32), row_ids)
        pairs = pairs if weights is None else _times(pairs, weights[:, None])
        return lax.bitcast_convert_type(pairs, table.dtype).reshape(-1, table.shape[1])
    taken = _take(table, row_ids)
    return taken if weights is None else _weigh(taken, weights).astype(table.dtype)


def scattered(rows: GatheredRows, drows: Float[Array, "r k"]) -> GatheredRows:
    """The gradients of table and weights, from the rows' gradient. Sums are in float32, or the rows' dtype if wider."""
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
    """Multiplies pairs of bfloat16 by weights. A bfloat16 is the upper half of a float32."""
    halves = (lax.bitcast_convert_type(half, jnp.float32) for half in (pairs << 16, pairs & jnp.uint32(0xFFFF0000)))
    products = ((weights.astype(jnp.float32) * half).astype(jnp.bfloat16) for half in halves)
    low, high = (lax.bitcast_convert_type(product, jnp.uint16).astype(jnp.uint32) for product in products)
    return low | high << 16


def _take(table, row_ids):
    return jnp.asarray(table).at[row_ids].get(mode="clip", wrap_negative_indices=False)
