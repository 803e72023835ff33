"""`ScaledRows`: rows of tokens as codes and scales, for products in which both operands are codes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int

from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats.registry import FORMATS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledRows:
    """Rows [R, K] as codes and scales. They get no gradient.

    Attributes:
        codes: [R, K], integers.
        scales: a tree of arrays [R, blocks along K].
        format: name of a registered `Format` that has rows.
        dtype: the dtype that the rows had, in which their products are returned.
    """

    codes: Array
    scales: Any
    format: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        num_rows, k = self.codes.shape
        return num_rows, k

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    def take(self, row_ids: Int[Array, " n"]) -> "ScaledRows":
        """The rows [n, K] with these indices. An index outside [0, R) takes the nearest row."""
        row_ids = jnp.asarray(row_ids)
        return jax.tree.map(lambda leaf: leaf.at[row_ids].get(mode="clip", wrap_negative_indices=False), self)

    def decode(self, dtype) -> Float[Array, "r k"]:
        """The values in dtype."""
        return rows_format(self.format).decode_rows(self.codes, self.scales, dtype)


export.register_pytree_node_serialization(
    ScaledRows,
    serialized_name="jax_latent_moe.ScaledRows",
    serialize_auxdata=lambda static: " ".join((static[0], jnp.dtype(static[1]).name)).encode(),
    deserialize_auxdata=lambda data: _static(*data.decode().split(" ")),
)


def _static(format, dtype):
    return format, jnp.dtype(dtype)


def encode_rows(rows: Float[Array, "r k"], name: str) -> ScaledRows:
    """Rows in a registered format, in blocks along K, such as 1 x 128 for "fp8_block".

    It can be jitted with name static.

    A row with NaN or infinity gives NaN in its own products, and in no other row's.

    Raises:
        ConfigError: no format has that name, or it is for weights only.
        InputError: the rows are not floating, or do not have two axes.
    """
    format = rows_format(name)
    if isinstance(rows, ScaledRows):
        raise InputError(f"rows are in {rows.format} already: `rows.decode(dtype)` gives their values.")
    rows = jnp.asarray(rows)
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating) or rows.dtype.itemsize < 2:
        raise InputError(
            f"rows of shape {rows.shape} and dtype {rows.dtype} must be floating with at least 16 bits, "
            "[rows, features]: cast them first."
        )
    codes, scales = format.encode_rows(rows.astype(jnp.float32))
    return ScaledRows(codes, scales, name, rows.dtype)


def rows_format(name: str) -> Any:
    """The registered format, which has rows.

    Raises:
        ConfigError: no format has that name, or it is for weights only.
    """
    having = ", ".join(format.name for format in FORMATS.values() if format.encode_rows is not None)
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"format={name!r} is unknown: rows can be in {having}.")
    if FORMATS[name].encode_rows is None:
        raise ConfigError(f"format={name!r} is for weights only: rows can be in {having}.")
    return FORMATS[name]
