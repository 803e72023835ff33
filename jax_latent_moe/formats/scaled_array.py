"""`ScaledArray`: a weight as codes and scales, which takes an array's place in the parameter tree."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float

from jax_latent_moe import checks
from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats.registry import FORMATS
from jax_latent_moe.formats.scaled_rows import ScaledRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """A weight [..., K, P * N] as codes and scales. It is a pytree, so it can be sharded and donated like an array.

    The weight is P matrices with their columns side by side, each with its own scales: 2 for gate and up, else 1.

    Attributes:
        codes: [..., P, N, K / packing].
        scales: a tree of arrays with as many axes as codes: [..., P, blocks along N or 1, blocks along K or 1].
        format: name of a registered `Format`.
    """

    codes: Array
    scales: Any
    format: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, P * N], the shape of the values."""
        *leading, parts, n, k = self.codes.shape
        return (*leading, k * FORMATS[self.format].packing, parts * n)

    @property
    def ndim(self) -> int:
        """Number of axes of the values."""
        return self.codes.ndim - 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index) -> "ScaledArray":
        """Indexes the leading axis of codes and scales, such as the experts' axis."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def decode(self, dtype) -> Float[Array, "*e k n"]:
        """The values in dtype."""
        values = jnp.moveaxis(FORMATS[self.format].decode(self.codes, self.scales, dtype), -1, -3)
        return values.reshape(self.shape)


export.register_pytree_node_serialization(
    ScaledArray,
    serialized_name="jax_latent_moe.ScaledArray",
    serialize_auxdata=lambda auxiliary: "".join(auxiliary).encode(),
    deserialize_auxdata=lambda data: (data.decode(),),
)


def encode(values: Float[Array, "*e k n"], name: str, *, parts: int = 1) -> ScaledArray:
    """A weight in a registered format. It can be jitted with name and parts static.

    Args:
        values: [..., K, P * N], floating.
        name: name of the format.
        parts: P, the number of matrices whose columns lie side by side: 2 for gate and up.

    Raises:
        ConfigError: no format has that name, its blocks do not divide the weight, or parts is not a positive integer.
        InputError: the values are not floating or have no K and N, or parts does not divide the columns.
    """
    if isinstance(values, ScaledArray | ScaledRows):
        raise InputError(f"values are in {values.format} already: decode them with `values.decode(dtype)` first.")
    if not isinstance(name, str) or name not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"format={name!r} is unknown: registered are {known}; `formats.register` adds one.")
    values, format, parts = jnp.asarray(values), FORMATS[name], checks.positive_int("parts", parts)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(f"values of dtype {values.dtype} must be floating: cast them first.")
    if values.ndim < 2:
        raise InputError(f"values of shape {values.shape} must be [..., K, parts * N]: reshape them to a matrix.")
    *leading, k, columns = values.shape
    if columns % parts:
        raise InputError(f"{columns} columns are not {parts} matrices side by side: parts must divide them.")
    for axis, size, multiple in zip(("K", "N"), (k, columns // parts), format.multiples(), strict=True):
        if size % multiple:
            raise ConfigError(
                f"{axis}={size} of a weight of {k} x {columns // parts} is not a multiple of {multiple}, which {name} "
                "needs: pad it, or choose a format with smaller or partial blocks, such as fp8_block."
            )
    matrices = jnp.moveaxis(values.reshape(*leading, k, parts, columns // parts), -3, -1)
    codes, scales = format.encode(matrices.astype(jnp.float32))
    return ScaledArray(codes, scales, name)


def map_axes(array: ScaledArray, axes: Sequence[Any], make: Callable[..., Any]) -> ScaledArray:
    """The results of make for each leaf of a `ScaledArray`, given the axes of its weight, such as mesh axes.

    Args:
        array: gives the shapes.
        axes: one for each axis of the dense weight: [..., K, N], or [..., K, P, N] if it has several matrices.
        make: called for each leaf with one of the axes, or None, for each axis of the leaf. An axis of size 1 gets
            None.
    """
    leading = array.codes.ndim - 3
    if len(axes) not in (leading + 2, leading + 3):
        raise InputError(f"{len(axes)} axes {tuple(axes)} do not name those of a weight of shape {array.shape}.")
    ordered = (*axes[:leading], axes[-2] if len(axes) == leading + 3 else None, axes[-1], axes[leading])

    def of_leaf(leaf):
        split = (axis if size > 1 else None for axis, size in zip(ordered, leaf.shape, strict=True))
        return make(*split)

    return jax.tree.map(of_leaf, array)


def format_of(array: Array | ScaledArray | ScaledRows) -> str:
    """Name of an array's format: the format of its codes, or else its dtype."""
    return array.format if isinstance(array, ScaledArray | ScaledRows) else jnp.dtype(array.dtype).name


def row_multiple_of(*arrays: Array | ScaledArray) -> int:
    """For products with these weights, the first row of each expert must be a multiple of this number."""
    scaled = [array for array in arrays if isinstance(array, ScaledArray)]
    return math.lcm(*(FORMATS[array.format].row_multiple for array in scaled))


def decoded(array: Array | ScaledArray, dtype) -> Array:
    """The values of a weight: a `ScaledArray` decoded to dtype, or an array as it is."""
    return array.decode(dtype) if isinstance(array, ScaledArray) else array
