"""The number formats of operands: a registry of formats, and `ScaledArray`, a weight stored in one of them.

The format of a plain array is its dtype. A new format is one `register` call. `encode` turns a weight into a
`ScaledArray`, which takes the weight's place in the parameter tree. `decode` returns the values.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe.errors import ConfigError

DENSE = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store a weight [..., K, N].

    Attributes:
        name: the name in the registry, in problems, tables and errors.
        bits: bits of one code.
        block: (K, N) elements that share one scale. The weight's K and N must be multiples of it.
        scale_bits: bits of one scale.
        encode: values [..., K, N] -> (codes, scales). Codes may be packed along K.
        decode: (codes, scales, dtype) -> values [..., K, N] in dtype.
        packing: number of values along K in one stored code.
        row_multiple: an expert's rows must begin at a multiple of it, for formats whose blocks run along rows.
    """

    name: str
    bits: int
    block: tuple[int, int]
    scale_bits: int
    encode: Callable[[Float[Array, "*e k n"]], tuple[Array, Any]]
    decode: Callable[[Array, Any, Any], Float[Array, "*e k n"]]
    packing: int = 1
    row_multiple: int = 1

    def __post_init__(self):
        numbers = {"bits": self.bits, "scale_bits": self.scale_bits, "packing": self.packing}
        numbers |= {"block[0]": self.block[0], "block[1]": self.block[1], "row_multiple": self.row_multiple}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} of format {self.name!r} must be an integer of at least 1.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """A weight as codes and scales. It is a pytree, so it can be converted and donated like an array.

    Layers over a mesh (`ParallelConfig`) refuse it.

    Attributes:
        codes: [..., K / packing, N].
        scales: an array, or a tree of arrays, with the same leading axes as codes.
        format: name of a registered `Format`.
    """

    codes: Array
    scales: Any
    format: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N], the shape of the values."""
        *leading, k, n = self.codes.shape
        return (*leading, k * FORMATS[self.format].packing, n)

    @property
    def ndim(self) -> int:
        """Number of axes of the values."""
        return self.codes.ndim

    def __getitem__(self, index) -> "ScaledArray":
        """Indexes the leading axis of codes and scales, such as that of the experts."""
        return ScaledArray(self.codes[index], jax.tree.map(lambda scale: scale[index], self.scales), self.format)

    def decode(self, dtype) -> Float[Array, "*e k n"]:
        """The values in dtype."""
        return FORMATS[self.format].decode(self.codes, self.scales, dtype)


FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Adds a format to the registry.

    Raises:
        ConfigError: the name is taken.
    """
    if format.name in FORMATS or format.name in DENSE:
        raise ConfigError(f"format {format.name!r} is registered already: choose another name.")
    FORMATS[format.name] = format


def encode(values: Float[Array, "*e k n"], name: str) -> ScaledArray:
    """A weight in a registered format.

    Raises:
        ConfigError: no format has that name, or its blocks do not divide the weight.
    """
    if name not in FORMATS:
        known = ", ".join(FORMATS) or "none"
        raise ConfigError(f"format={name!r} is unknown: registered are {known}; `formats.register` adds one.")
    blocks = FORMATS[name].block
    if any(size % block for size, block in zip(values.shape[-2:], blocks, strict=True)):
        raise ConfigError(
            f"a weight of {values.shape[-2]} x {values.shape[-1]} does not divide into {name}'s blocks of "
            f"{blocks[0]} x {blocks[1]}: pad it, or choose a format with smaller blocks."
        )
    codes, scales = FORMATS[name].encode(values)
    return ScaledArray(codes, scales, name)


def format_of(array: Array | ScaledArray) -> str:
    """Name of an array's format: that of a `ScaledArray`, or else the dtype's."""
    return array.format if isinstance(array, ScaledArray) else jnp.dtype(array.dtype).name


def row_multiple_of(*arrays: Array | ScaledArray) -> int:
    """The number that the first row of each expert must be a multiple of, for products with these weights."""
    scaled = [array for array in arrays if isinstance(array, ScaledArray)]
    return math.lcm(*(FORMATS[array.format].row_multiple for array in scaled))


def decoded(array: Array | ScaledArray, dtype) -> Array:
    """The values of a weight: a `ScaledArray` decoded to dtype, or an array as it is."""
    return array.decode(dtype) if isinstance(array, ScaledArray) else array
