"""Weight formats by their published definitions, one block at a time in NumPy; casts are ml_dtypes'.

A matrix is [N, K], as checkpoints hold it. Each encoder returns codes (bytes before packing), and scales by name.
"""

import ml_dtypes
import numpy as np

F32 = np.float32
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def e2m1(code: int) -> float:
    """OCP Microscaling Formats 1.0, section 5.3.3: sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def e4m3(code: int) -> float:
    """OCP 8-bit Floating Point 1.0: sign, four bits of exponent (bias 7), three of mantissa, 0x7F is NaN."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


E2M1 = np.array([e2m1(code) for code in range(16)])
E4M3_VALUES = np.array([e4m3(code) for code in range(256)])


def nearest_e2m1(values) -> np.ndarray:
    """The nearest of the eight magnitudes, the even code of two at the same distance, and the sign; 0 for NaN."""
    sizes = np.minimum(np.nan_to_num(np.abs(np.float64(values)), nan=0.0), 6.0)
    distance = np.abs(sizes[..., None] - E2M1[:8])
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first of equals: even codes first
    return (order[distance[..., order].argmin(-1)] + 8 * np.signbit(values)).astype(np.uint8)


def nearest_e4m3(values) -> np.ndarray:
    return values.astype(E4M3).view(np.uint8)


def blocks_of(matrix, n_block, k_block):
    """(block row, block column, slices) of each block, partial ones at the end."""
    n, k = matrix.shape
    for i, row in enumerate(range(0, n, n_block)):
        for j, column in enumerate(range(0, k, k_block)):
            yield i, j, (slice(row, min(row + n_block, n)), slice(column, min(column + k_block, k)))


def by_block(matrix, n_block, k_block, encode_block):
    """encode_block(block) -> (codes, scales by name), put together."""
    codes, scales = None, {}
    grid = -(-matrix.shape[0] // n_block), -(-matrix.shape[1] // k_block)
    for i, j, where in blocks_of(matrix, n_block, k_block):
        own, named = encode_block(matrix[where])
        codes = np.zeros(matrix.shape, own.dtype) if codes is None else codes
        codes[where] = own
        for name, scale in named.items():
            scales.setdefault(name, np.zeros(grid, np.asarray(scale).dtype))[i, j] = scale
    return codes, scales


def fp8_block(matrix, power_of_two=False, n_block=128, least=1e-4):
    """DeepGEMM, deep_gemm/utils/math.py: per_block_cast_to_fp8, and per_token_cast_to_fp8 with blocks of one row."""

    def encode(block):
        scale = np.maximum(np.abs(block).max(), F32(least)) / F32(448)
        if power_of_two and np.isfinite(scale):
            scale = F32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        return nearest_e4m3(block * (F32(1) / scale)), {"block": scale}

    return by_block(matrix, n_block, 128, encode)


def fp8_whole(matrix, n_block, name):
    """ModelOpt: scale = amax / 448."""

    def encode(block):
        scale = np.abs(block).max() / F32(448)
        scale = F32(1) if scale == 0 else scale
        return nearest_e4m3(block / scale), {name: scale}

    return by_block(matrix, n_block, matrix.shape[1], encode)


def mxfp4(matrix):
    """OCP Microscaling Formats 1.0, section 6.3."""

    def encode(block):
        amax = np.float64(np.abs(block).max())
        if not np.isfinite(amax):
            return np.zeros(block.shape, np.uint8) | np.signbit(block) << 3, {"block": np.uint8(255)}
        exponent = -127 if amax < 2.0**-126 else max(int(np.floor(np.log2(amax))) - 2, -127)
        return nearest_e2m1(np.float64(block) / 2.0**exponent), {"block": np.uint8(exponent + 127)}

    return by_block(matrix, 1, 32, encode)


def nvfp4(matrix):
    """ModelOpt, NVFP4QTensor: one float32 scale a matrix, one E4M3 scale for each 16."""
    tensor = np.abs(matrix).max() / F32(6 * 448)
    tensor = F32(1) if tensor == 0 else tensor

    def encode(block):
        scale = np.abs(block).max() / (F32(6) * tensor)
        scale = nearest_e4m3(F32(1) if scale == 0 else scale)
        divisor = scale.view(E4M3).astype(F32) * tensor
        scaled = np.zeros_like(block) if divisor == 0 else block / divisor
        return nearest_e2m1(scaled), {"block": scale}

    codes, scales = by_block(matrix, 1, 16, encode)
    return codes, scales | {"tensor": np.full((1, 1), tensor, F32)}


def int4(matrix, group):
    """compressed-tensors, calculate_qparams with symmetric=True; codes are stored with 8 added."""

    def encode(block):
        scale = (np.abs(block).max() / F32(7.5)).astype(BF16)
        scale = BF16(1) if scale == 0 else scale
        steps = np.nan_to_num(np.rint(block / scale.astype(F32)), nan=0.0)
        return (np.clip(steps, -8, 7) + 8).astype(np.uint8), {"block": scale}

    return by_block(matrix, 1, group, encode)


def int4_zero(matrix, group):
    """GPTQ (Quantizer.find_params) and AWQ (pseudo_quantize_tensor): a range that holds 0, zero points of 4 bits."""

    def encode(block):
        least, most = np.minimum(block.min(), F32(0)), np.maximum(block.max(), F32(0))
        # The definition's float32 operations, halved: the difference of two large numbers would be infinite.
        scale = ((most / 2 - least / 2) / F32(7.5)).astype(BF16)
        scale = BF16(1) if scale == 0 else scale
        zero = np.clip(np.nan_to_num(np.rint(-least / scale.astype(F32)), nan=0.0), 0, 15)
        steps = np.nan_to_num(np.rint(block / scale.astype(F32)) + zero, nan=0.0)
        return np.clip(steps, 0, 15).astype(np.uint8), {"block": scale, "zero": np.uint8(zero)}

    return by_block(matrix, 1, group, encode)


def int8(matrix):
    """FastDeploy's weight-only int8: scale = amax / 127 of an output channel."""

    def encode(block):
        scale = np.abs(block).max() / F32(127)
        scale = F32(1) if scale == 0 else scale
        return np.clip(np.nan_to_num(np.rint(block / scale), nan=0.0), -127, 127).astype(np.int8), {"channel": scale}

    return by_block(matrix, 1, matrix.shape[1], encode)


ENCODERS = {
    "fp8_block": fp8_block,
    "fp8_block_pow2": lambda matrix: fp8_block(matrix, power_of_two=True),
    "fp8_tensor": lambda matrix: fp8_whole(matrix, matrix.shape[0], "tensor"),
    "fp8_channel": lambda matrix: fp8_whole(matrix, 1, "channel"),
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "int4_32": lambda matrix: int4(matrix, 32),
    "int4_128": lambda matrix: int4(matrix, 128),
    "int4_32_zero": lambda matrix: int4_zero(matrix, 32),
    "int4_128_zero": lambda matrix: int4_zero(matrix, 128),
    "int8": int8,
}


def decode(name, codes, scales, block=None) -> np.ndarray:
    """The values in float64, rounded to float32 after each product; `block` is their size if some are partial."""
    if name.startswith("fp8"):
        steps = E4M3_VALUES[codes]
    elif name in ("mxfp4", "nvfp4"):
        steps = E2M1[codes]
    elif name.startswith("int4"):
        zero = _spread(scales["zero"], codes.shape, None).astype(float) if "zero" in scales else 8.0
        steps = codes - zero
    else:
        steps = codes.astype(float)
    for scale_name, scale in scales.items():
        if scale_name == "zero":
            continue
        if name == "mxfp4":
            scale = np.where(scale == 255, np.nan, 2.0 ** (scale.astype(float) - 127))
        elif scale.dtype == np.uint8:
            scale = E4M3_VALUES[scale]
        steps = np.float64((steps * _spread(np.float64(scale), codes.shape, block)).astype(F32))
    return steps


def _spread(scale, shape, block):
    """A scale for each element; the last blocks may be partial."""
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, block or size // scale.shape[axis], axis)[(slice(None),) * axis + (slice(size),)]
    return scale


def packed(name, codes) -> np.ndarray:
    """The stored bytes of codes [..., K]: four bits of each in words of 32 bits, the least significant byte first."""
    if name.startswith(("fp8", "int8")):
        return codes
    k = codes.shape[-1]
    words = np.zeros((*codes.shape[:-1], k // 8), np.uint32)
    for i in range(k):
        word, bits = place(name, i, k)
        for bit, target in enumerate(bits):
            words[..., word] |= (np.uint32(codes[..., i]) >> bit & 1) << target
    return words.astype("<u4").view(np.uint8)


def unpacked(name, stored) -> np.ndarray:
    """The codes of `packed`."""
    words, k = np.ascontiguousarray(stored).view("<u4"), 2 * stored.shape[-1]
    codes = np.zeros((*stored.shape[:-1], k), np.uint8)
    for i in range(k):
        word, bits = place(name, i, k)
        for bit, source in enumerate(bits):
            codes[..., i] |= ((words[..., word] >> source & 1) << bit).astype(np.uint8)
    return codes


def place(name, i, k) -> tuple[int, list[int]]:
    """The word of code i of k, and the places there of its bits 0 (the lowest) to 3."""
    group, within = divmod(i, 32)
    words = 4 if 32 * group + 32 <= k else 2
    pair, within = divmod(within, 2 * words)
    word, half = 4 * group + within // 2, within % 2
    if name.startswith("int4"):
        return word, [16 * half + 4 * pair + bit for bit in range(4)]
    if pair == 3:
        return word, [16 * half + bit for bit in (4, 0, 1, 3)]
    mantissa, exponent, sign = 6, (7, 8), 15  # as in a bfloat16
    return word, [(16 * half + bit + 3 * pair) % 32 for bit in (mantissa, *exponent, sign)]
