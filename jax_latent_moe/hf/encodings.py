"""The encodings of a stored matrix [out, in]: plain, or quantised in blocks along the input axis.

Formats:
    MXFP4: OCP Microscaling Formats 1.0. E2M1 codes in blocks of 32, with one E8M0 scale (2^(u - 127)) per block.
    NVFP4: E2M1 codes in blocks of 16, with one E4M3 scale per block and one float32 scale per matrix. ModelOpt's files
        multiply by the scale of the matrix, those of compressed-tensors divide by it.
    FP8: E4M3 codes with one scale per matrix or per row. DeepSeek-V3 and Qwen3 have one per 128 x 128 block.
The scales of a matrix, row or 128 x 128 block are float32, or 16-bit in some files (Qwen3's). Products are in float32.
gpt-oss has the codes and scales of all experts in one tensor each: blocks [E, out, in / 32, 16] and scales
[E, out, in / 32]. Two E2M1 codes share a byte, and the low four bits hold the first, in every one of these.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jax_latent_moe.hf.tensor_file import DTYPES, TensorInfo

FLOAT8 = DTYPES["F8_E4M3"]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The value of each code: one sign bit, two exponent bits, one mantissa bit."""
_E2M1_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1)
_TILE = 128

Parts = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One way to store a matrix.

    Attributes:
        name: the name used in messages.
        dtypes: the dtypes allowed for each tensor, by the tensor's suffix.
        shapes: maps the matrix's (out, in) to the shapes allowed for each tensor.
        decode: maps the tensors to the matrix in float32; None if the tensor is the matrix itself.
        unused: suffixes of tensors that may be present and do not affect the weight (scales of activations).
    """

    name: str
    dtypes: dict[str, tuple[str, ...]]
    shapes: Callable[[int, int], dict[str, tuple[Shape, ...]]]
    decode: Callable[[Parts], np.ndarray] | None = None
    unused: tuple[str, ...] = ()


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Decodes E2M1 codes, two per byte, to values [out, in] in float32."""
    return _E2M1_PAIRS[packed].reshape(packed.shape[0], -1)


def _times_blocks(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Multiplies each block of each row by its scale, in place."""
    blocks = values.reshape(*scales.shape, -1)
    blocks *= scales[..., None]
    return values


def _mxfp4(parts: Parts) -> np.ndarray:
    exponents = _exponents(parts["weight_scale"])
    return _times_blocks(_unpack(parts["weight_packed"]), np.ldexp(np.float32(1), exponents.astype(np.int32) - 127))


def _mxfp4_blocks(parts: Parts) -> np.ndarray:
    blocks = parts["blocks"]
    return _mxfp4({"weight_packed": blocks.reshape(len(blocks), -1), "weight_scale": parts["scales"]})


def _nvfp4_blocks(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _times_blocks(_unpack(packed), _finite(scale.astype(np.float32)))  # exact: 2 + 4 bits of significand


def _nvfp4_modelopt(parts: Parts) -> np.ndarray:
    return _nvfp4_blocks(parts["weight"], parts["weight_scale"]) * _scales(parts["weight_scale_2"]).reshape(())


def _nvfp4_compressed(parts: Parts) -> np.ndarray:
    divisor = _scales(parts["weight_global_scale"]).reshape(())
    if divisor == 0:
        raise ValueError("its global scale is 0")
    return _nvfp4_blocks(parts["weight_packed"], parts["weight_scale"]) / divisor


def _fp8(parts: Parts) -> np.ndarray:
    scale = _scales(parts["weight_scale"])
    return _finite(parts["weight"].astype(np.float32)) * (scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(()))


def _fp8_tiles(parts: Parts) -> np.ndarray:
    values, scales = _finite(parts["weight"].astype(np.float32)), _scales(parts["weight_scale_inv"])
    rows = np.repeat(scales, _TILE, axis=0)[: values.shape[0]]
    return values * np.repeat(rows, _TILE, axis=1)[:, : values.shape[1]]


def _exponents(scale: np.ndarray) -> np.ndarray:
    exponents = scale.view(np.uint8)
    # The format defines 255 as NaN. 253 and 254 could overflow float32; real weights are far smaller.
    if exponents.size and exponents.max() > 252:
        raise ValueError(f"a block scale is {exponents.max()} (2^(u - 127), 255 is NaN), over the limit of 252")
    return exponents


def check_values(encoding: Encoding, suffix: str, values: np.ndarray) -> None:
    """Raises ValueError if a tensor holds a value that its encoding's `decode` refuses."""
    if suffix in encoding.unused:
        return
    if encoding in (MXFP4, MXFP4_BLOCKS, MXFP4_SCALE) and suffix in ("weight_scale", "scales", "scale"):
        _exponents(values)
    elif values.dtype == FLOAT8:  # NaN is the byte 0x7F or 0xFF
        if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
            raise ValueError("it holds NaN or infinity")
    elif values.dtype == DTYPES["F8_E8M0"] or jnp.issubdtype(values.dtype, np.floating):
        _finite(values.astype(np.float32))


def _scales(values):
    return _finite(values.astype(np.float32))


def _finite(values):
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    return values


_SCALES = ("F32", "BF16", "F16")
PLAIN = Encoding("plain", {"weight": ("BF16", "F16", "F32", "F64")}, lambda out, in_: {"weight": ((out, in_),)})
MXFP4 = Encoding(
    "MXFP4",
    {"weight_packed": ("U8",), "weight_scale": ("U8", "F8_E8M0")},
    lambda out, in_: {"weight_packed": ((out, in_ // 2),), "weight_scale": ((out, in_ // 32),)},
    _mxfp4,
)
MXFP4_BLOCKS = Encoding(
    "MXFP4 (gpt-oss)",
    {"blocks": ("U8",), "scales": ("U8",)},
    lambda out, in_: {"blocks": ((out, in_ // 32, 16),), "scales": ((out, in_ // 32),)},
    _mxfp4_blocks,
)
"""One expert of a tensor that holds all."""
MXFP4_SCALE = Encoding(
    "MXFP4 (DeepSeek-V4)",
    {"weight": ("I8", "U8"), "scale": ("F8_E8M0", "U8")},
    lambda out, in_: {"weight": ((out, in_ // 2),), "scale": ((out, in_ // 32),)},
    lambda parts: _mxfp4({"weight_packed": parts["weight"].view(np.uint8), "weight_scale": parts["scale"]}),
)
_NVFP4_SCALARS: tuple[Shape, ...] = ((), (1,))
NVFP4_MODELOPT = Encoding(
    "NVFP4 (ModelOpt)",
    {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": _SCALES},
    lambda out, in_: {
        "weight": ((out, in_ // 2),),
        "weight_scale": ((out, in_ // 16),),
        "weight_scale_2": _NVFP4_SCALARS,
    },
    _nvfp4_modelopt,
    ("input_scale",),
)
NVFP4_COMPRESSED = Encoding(
    "NVFP4 (compressed-tensors)",
    {"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",), "weight_global_scale": _SCALES},
    lambda out, in_: {
        "weight_packed": ((out, in_ // 2),),
        "weight_scale": ((out, in_ // 16),),
        "weight_global_scale": _NVFP4_SCALARS,
    },
    _nvfp4_compressed,
    ("input_global_scale",),
)
FP8 = Encoding(
    "FP8",
    {"weight": ("F8_E4M3",), "weight_scale": _SCALES},
    lambda out, in_: {"weight": ((out, in_),), "weight_scale": ((), (1,), (out,), (out, 1))},
    _fp8,
    ("input_scale",),
)
FP8_TILES = Encoding(
    "FP8 (128 x 128 blocks)",
    {"weight": ("F8_E4M3",), "weight_scale_inv": _SCALES},
    lambda out, in_: {
        "weight": ((out, in_),),
        "weight_scale_inv": ((math.ceil(out / _TILE), math.ceil(in_ / _TILE)),),
    },
    _fp8_tiles,
)
FP8_TILES_SCALE = Encoding(
    "FP8 (128 x 128 blocks, DeepSeek-V4)",
    {"weight": ("F8_E4M3",), "scale": ("F8_E8M0", "F32")},
    lambda out, in_: {"weight": ((out, in_),), "scale": ((math.ceil(out / _TILE), math.ceil(in_ / _TILE)),)},
    lambda parts: _fp8_tiles({"weight": parts["weight"], "weight_scale_inv": parts["scale"]}),
)
_BLOCK = {
    "MXFP4": 32,
    "MXFP4 (gpt-oss)": 32,
    "MXFP4 (DeepSeek-V4)": 32,
    "NVFP4 (ModelOpt)": 16,
    "NVFP4 (compressed-tensors)": 16,
}


def identify(parts: Mapping[str, TensorInfo]) -> Encoding:
    """The most likely encoding of tensors with these suffixes and dtypes; `problems` checks whether it fits."""
    if "weight_packed" in parts:
        scale = parts.get("weight_scale")
        return NVFP4_COMPRESSED if scale is not None and scale.dtype == "F8_E4M3" else MXFP4
    dtype = parts["weight"].dtype if "weight" in parts else None
    if "scale" in parts:
        return FP8_TILES_SCALE if dtype == "F8_E4M3" else MXFP4_SCALE
    if dtype == "U8":
        return NVFP4_MODELOPT
    if dtype == "F8_E4M3":
        return FP8_TILES if "weight_scale_inv" in parts else FP8
    return PLAIN


def problems(base: str, encoding: Encoding, shape: Shape, parts: Mapping[str, TensorInfo]) -> list[str]:
    """A sentence for each thing wrong with the tensors `base` + suffix, which should hold a matrix of this shape."""
    out, in_ = shape
    block = _BLOCK.get(encoding.name, 1)
    if in_ % block:
        return [f"{base}*: {encoding.name} needs an input width that is a multiple of {block}, not {in_}."]
    found, shapes = [], encoding.shapes(out, in_)
    for suffix, dtypes in encoding.dtypes.items():
        if suffix not in parts:
            found.append(f"missing {base}{suffix} ({encoding.name}).")
            continue
        info = parts[suffix]
        if info.dtype not in dtypes:
            found.append(f"{base}{suffix}: dtype {info.dtype}, expected {' or '.join(dtypes)}.")
        if info.shape not in shapes[suffix]:
            allowed = " or ".join(str(list(allowed)) for allowed in shapes[suffix])
            found.append(f"{base}{suffix}: shape {list(info.shape)}, expected {allowed}.")
    extra = set(parts) - set(encoding.dtypes) - set(encoding.unused)
    return found + [f"not expected: {base}{suffix} (beside {encoding.name})." for suffix in sorted(extra)]
