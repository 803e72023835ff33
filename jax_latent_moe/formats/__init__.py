"""The number formats of operands: a registry of formats, and weights and rows stored in one of them.

The format of a plain array is its dtype. A new format is one `register` call. `encode` turns a weight into a
`ScaledArray`, which takes the weight's place in the parameter tree. `encode_rows` turns rows of tokens into
`ScaledRows`. `decode` returns the values. `pack` puts codes that were made elsewhere in the format's order.
"""

from jax_latent_moe.formats import fp4, fp8, integers
from jax_latent_moe.formats.packed_codes import pack, unpack
from jax_latent_moe.formats.registry import DENSE, FORMATS, Format, register
from jax_latent_moe.formats.scaled_array import ScaledArray, decoded, encode, format_of, map_axes, row_multiple_of
from jax_latent_moe.formats.scaled_rows import ScaledRows, encode_rows

for _format in (*fp8.FORMATS, *fp4.FORMATS, *integers.FORMATS):
    register(_format)

__all__ = [
    "DENSE",
    "FORMATS",
    "Format",
    "ScaledArray",
    "ScaledRows",
    "decoded",
    "encode",
    "encode_rows",
    "format_of",
    "map_axes",
    "pack",
    "register",
    "row_multiple_of",
    "unpack",
]
