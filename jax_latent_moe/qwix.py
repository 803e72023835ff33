"""Weights to and from the `QArray` of qwix, in the formats that it can express. No value changes.

Example::

    w_in = from_qarray(qwix.quantize(w, jnp.int8, channelwise_axes=[0, 2]))  # w is [E, K, N]
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from jax_latent_moe import checks
from jax_latent_moe.errors import InputError, needs_extra
from jax_latent_moe.formats import FORMATS, ScaledArray, pack, unpack
from jax_latent_moe.formats.fp8 import wide_scales
from jax_latent_moe.formats.integers import ZERO

with needs_extra("qwix"):
    from qwix import QArray

_FP8, _INT4, _FP4 = map(jnp.dtype, (jnp.float8_e4m3fn, jnp.int4, jnp.float4_e2m1fn))

# By format: the dtype of the codes in a QArray, and our name of their scales.
_FORMATS = {
    "fp8_tensor": (_FP8, "tensor"),
    "fp8_channel": (_FP8, "channel"),
    "fp8_block": (_FP8, "block"),
    "fp8_block_pow2": (_FP8, "block"),
    "int8": (jnp.dtype(jnp.int8), "channel"),
    "int4_32": (_INT4, "block"),
    "int4_128": (_INT4, "block"),
    "int4_32_zero": (_INT4, "block"),
    "int4_128_zero": (_INT4, "block"),
    "mxfp4": (_FP4, "block"),
}


def to_qarray(weight: ScaledArray) -> QArray:
    """The weight as a QArray [..., K, N], or [..., K, P, N] if it has P matrices side by side.

    Scales of E8M0 become float32. A checkpoint's static scale of the inputs, which no product uses, is left out.

    Raises:
        InputError: weight is not a `ScaledArray` of arrays, its format has more than one scale for a value, or its last
            block is partial.
    """
    if not isinstance(weight, ScaledArray):
        raise InputError(f"weight is of type {type(weight).__name__}, not ScaledArray: `quantize` makes one.")
    _check_leaves("to_qarray", "weight", weight)
    if weight.format not in _FORMATS:
        raise InputError(
            f"a QArray cannot hold {weight.format}: it has one scale for a value. Encode the decoded weight in one of "
            f"{', '.join(_FORMATS)}."
        )
    dtype, name = _FORMATS[weight.format]
    codes, scales = weight.codes, weight.scales[name]
    if dtype in (_INT4, _FP4):
        codes = unpack(codes, weight.format)
    if dtype == _FP4:
        codes = codes.astype(jnp.uint4)
    if scales.dtype == jnp.uint8:
        scales = wide_scales({"block": scales})
    if _blocks(weight.format, *codes.shape[-2:]) is None:
        n, k = codes.shape[-2:]
        raise InputError(
            f"a QArray has no partial blocks, but {k} x {n} in {weight.format} ends in some: pad the weight."
        )
    zero = weight.scales.get("zero")
    codes = _signed(codes) if dtype == _INT4 else lax.bitcast_convert_type(codes, dtype)
    one = codes.shape[-3] == 1

    def of_leaf(leaf):
        leaf = jnp.moveaxis(leaf, -1, -3)
        return jnp.squeeze(leaf, -2) if one else leaf

    return QArray(of_leaf(codes), of_leaf(scales), None if zero is None else of_leaf(_signed(zero)))


def from_qarray(array: QArray, *, parts: int = 1) -> ScaledArray:
    """The QArray as a weight of the layer.

    The format is the one with the fewest scales whose blocks lie within the tiles of the QArray. The kernels read int4
    only with bfloat16 scales, to which `array.astype(jnp.bfloat16)` rounds.

    Args:
        array: [..., K, N], or [..., K, P, N] with parts=P, such as w_in of gated experts with P = 2.
        parts: the number of matrices of that axis; 1 if there is none.

    Raises:
        InputError: array is not a QArray of arrays, has another shape, or has tiles or zero points that no format has;
            or scales of float4_e2m1fn are traced, or are not powers of two as mxfp4 needs.
        ConfigError: parts is not a positive integer.
    """
    if not isinstance(array, QArray):
        raise InputError(f"array is of type {type(array).__name__}, not QArray: `qwix.quantize` makes one.")
    _check_leaves("from_qarray", "array", array)
    parts = checks.positive_int("parts", parts)
    leaves = [leaf for leaf in (array.qvalue, array.scale, array.zero_point) if leaf is not None]
    shapes = [leaf.shape for leaf in leaves]
    if len(set(map(len, shapes))) > 1:
        raise InputError(
            f"array has values of shape {shapes[0]} with scales or zero points of shape {shapes[1:]}: they need the "
            "same number of axes, of size 1 where values share one."
        )
    if parts == 1 and array.ndim >= 2:
        leaves = [jnp.expand_dims(leaf, -2) for leaf in leaves]
    if array.ndim < 2 or leaves[0].ndim < 3 or leaves[0].shape[-2] != parts:
        raise InputError(
            f"array has shape {array.shape} and {parts=}: it must be [..., K, N] with parts=1, or [..., K, parts, N]."
        )
    codes, *tiles = (jnp.moveaxis(leaf, -3, -1) for leaf in leaves)
    name, shape = _fitting(array, codes.shape, [leaf.shape for leaf in tiles])
    scale, *zeros = (_repeated(leaf, shape) for leaf in tiles)
    dtype, scale_name = _FORMATS[name]
    if dtype == _INT4:
        codes = pack(_unsigned(codes), name)
    elif dtype == _FP4:
        codes = pack(lax.bitcast_convert_type(codes, jnp.uint4).astype(jnp.uint8), name)
        scale = _exponents(scale)
    else:
        codes = lax.bitcast_convert_type(codes, jnp.uint8) if dtype == _FP8 else codes
        scale = scale.astype(jnp.float32)  # which is what kernels read
    scales = {scale_name: scale}
    if zeros:
        scales["zero"] = _unsigned(zeros[0])
    return ScaledArray(codes, scales, name)


def _check_leaves(function: str, name: str, value: QArray | ScaledArray) -> None:
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InputError(
                f"{name} holds shapes without values, such as {leaf}: jax.eval_shape({function}, {name}) gives the "
                "result's shapes."
            )


def _fitting(array: QArray, codes, scales) -> tuple[str, tuple[int, ...]]:
    """The format for codes of shape [..., P, N, K], and the shape of its scales, which those of the array divide."""
    fitting = []
    for name, (dtype, _) in _FORMATS.items():
        blocks = _blocks(name, *codes[-2:])
        is_value = array.qvalue.dtype == dtype and array.qtype != "nf4"  # whose codes are places in a table
        if blocks is not None and is_value and len(scales) == 1 + name.endswith("_zero"):
            shape = (*codes[:-2], *blocks)
            if all(_divides(given, size) for of_leaf in scales for size, given in zip(shape, of_leaf, strict=True)):
                fitting.append((math.prod(blocks), name, shape))
    if not fitting:
        codes_name = array.qtype if isinstance(array.qtype, str) else array.qvalue.dtype.name
        formats = ", ".join(f"{name} ({_described(name)})" for name in _FORMATS)
        zero = "with" if len(scales) > 1 else "without"
        raise InputError(
            f"no format has {codes_name} codes of shape {array.shape} with scales of shape {array.scale.shape} "
            f"{zero} zero points. Formats are, with the values along K x N that share a scale: {formats}."
        )
    _, name, shape = min(fitting, key=lambda fit: fit[0])
    return name, shape


def _divides(given: int, size: int) -> bool:
    return size == given or (given > 0 and size % given == 0)


def _described(name: str) -> str:
    k, n = ("all" if size is None else size for size in FORMATS[name].block)
    return f"{_FORMATS[name][0].name}, {k} x {n}"


def _blocks(name: str, n: int, k: int) -> tuple[int, int] | None:
    """The numbers of blocks along N and K; None if the last ones would be partial beside others."""
    sizes, format = (k, n), FORMATS[name]
    blocks = format.blocks(k, n)
    fits = all(size % multiple == 0 for size, multiple in zip(sizes, format.multiples(), strict=True))
    zipped = zip(sizes, blocks, format.block, strict=True)
    whole = all(count == 1 or size == count * (block or size) for size, count, block in zipped)
    return (blocks[1], blocks[0]) if fits and whole else None


def _repeated(leaf: Array, shape: tuple[int, ...]) -> Array:
    for axis, size in enumerate(shape):
        if size != leaf.shape[axis]:
            leaf = jnp.repeat(leaf, size // leaf.shape[axis], axis)
    return leaf


def _signed(codes: Array) -> Array:
    return (codes.astype(jnp.int8) - ZERO).astype(jnp.int4)


def _unsigned(codes: Array) -> Array:
    return (codes.astype(jnp.int8) + ZERO).astype(jnp.uint8)


def _exponents(scales: Array) -> Array:
    """The bytes of E8M0 for powers of two."""
    if isinstance(scales, Tracer):
        raise InputError(
            "scales of float4_e2m1fn codes are checked to be powers of two, so they must not be traced: call "
            "from_qarray outside of jit, vmap and eval_shape. It takes any leading axes."
        )
    bits = lax.bitcast_convert_type(scales.astype(jnp.float32), jnp.int32)
    smallest = bits == 1 << 22  # 2^-127 is subnormal
    power = smallest | (bits & 0x7FFFFF == 0) & (bits > 0) & (bits < 255 << 23)
    if not jnp.all(power | jnp.isnan(scales)):
        raise InputError(
            "some scales of float4_e2m1fn codes are no powers of two, and mxfp4 has no others: encode the values anew, "
            "formats.encode(qwix.dequantize(array), 'mxfp4')."
        )
    return jnp.where(jnp.isnan(scales), 255, jnp.where(smallest, 0, bits >> 23)).astype(jnp.uint8)
