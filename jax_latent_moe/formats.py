"""The number formats of operands: one registry of how values are stored, and `ScaledArray`, which stores them so.

A plain array has the format of its dtype. Any other format is one `register` call: `encode` makes a `ScaledArray` of a
weight, which takes the weight's place in a tree of parameters, and `decode` gives the values back.
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
    """How a weight [..., K, N] is stored.

    Attributes:
        name: of the registry, and in problems, tables and errors.
        bits: bits of one code.
        block: (K, N) elements that share one scale. Sizes that a weight has must be multiples of it.
        scale_bits: bits of one scale.
        encode: values [..., K, N] -> (codes, scales). Codes may be packed along K.
        decode: (codes, scales, dtype) -> values [..., K, N] in dtype.
        packing: values that one stored code holds, along K.
        row_multiple: multiple at which an expert's rows must begin, for formats whose blocks run along rows.
    """

    name: str
    bits: int
    block: tuple[int, int]
    scale_bits: int
    encode: Callable[[Float[Array, "*e k n"]], tuple[Array, Any]]
    decode: Callable[[Array, Any, Any], Float[Array, "*e k n"]]
    packing: int = 1
    row_multiple: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """A weight as codes and scales: a subtree of parameters, which can be sharded and donated like any array.

    Attributes:
        codes: [..., K / packing, N].
        scales: an array, or a tree of arrays, whose leading axes are those of codes.
        format: name of a registered `Format`.
    """

    codes: Array
    scales: Any
    format: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N], of the values."""
        *leading, k, n = self.codes.shape
        return (*leading, k * FORMATS[self.format].packing, n)

    @property
    def ndim(self) -> int:
        """Axes of the values."""
        return self.codes.ndim

    def __getitem__(self, index) -> "ScaledArray":
        """The same experts of codes and scales; index runs over the leading axis."""
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
        raise ConfigError(f"format={name!r} is unknown: the registered ones are {known}; `formats.register` adds one.")
    blocks = FORMATS[name].block
    if any(size % block for size, block in zip(values.shape[-2:], blocks, strict=True)):
        raise ConfigError(
            f"a weight of {values.shape[-2]} x {values.shape[-1]} does not divide into blocks of "
            f"{blocks[0]} x {blocks[1]}, which {name} scales: pad it, or choose a format of smaller blocks."
        )
    codes, scales = FORMATS[name].encode(values)
    return ScaledArray(codes, scales, name)


def format_of(array: Array | ScaledArray) -> str:
    """Name of the format of an array: that of its registry, or its dtype."""
    return array.format if isinstance(array, ScaledArray) else jnp.dtype(array.dtype).name


def row_multiple_of(*arrays: Array | ScaledArray) -> int:
    """Multiple at which an expert's rows must begin for products with these weights."""
    scaled = [array for array in arrays if isinstance(array, ScaledArray)]
    return math.lcm(*(FORMATS[array.format].row_multiple for array in scaled))


def decoded(array: Array | ScaledArray, dtype) -> Array:
    """The values of a weight: decoded to dtype where it is a `ScaledArray`, else as they are."""
    return array.decode(dtype) if isinstance(array, ScaledArray) else array
