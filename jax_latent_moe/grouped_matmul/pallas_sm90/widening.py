"""The formats whose codes the Pallas kernel widens, and how a thread widens one step of K: `words` put together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax_latent_moe.grouped_matmul.pallas_sm90 import words as w

ROWS = 64
"""Outputs of one fragment."""
HALF = w.STEP // 2
"""Elements of K whose scales a thread loads at once."""
BIASED_ZERO = 0x43084308
"""A pair of 128 plus the code of 0 in a symmetric int4 format."""


@dataclasses.dataclass(frozen=True)
class Widening:
    """How a format's codes become bfloat16.

    Attributes:
        packing: codes in a byte.
        pairs: makes pairs of bfloat16 from a word of codes.
        group: elements along K that share a scale which is multiplied in registers; None if there is none.
        scales: makes pairs of equal bfloat16 from the bytes of those scales.
        item_bytes: bytes of each array of them, by its name in `ScaledArray.scales`.
        outer: the float32 scale that multiplies sums: "tensor" for each matrix, "channel" for each output, or None.
        block: whether there is a float32 scale for each block of 128 x 128, which multiplies before codes are rounded.
    """

    packing: int
    pairs: Callable[..., list]
    group: int | None = None
    scales: Callable[..., list] | None = None
    item_bytes: tuple[tuple[str, int], ...] = ()
    outer: Literal["tensor", "channel"] | None = None
    block: bool = False

    def row_bytes(self, k: int) -> dict[str, int]:
        """Bytes of one output's scales, by name."""
        return {name: size * (k // (self.group or k)) for name, size in self.item_bytes}

    def step_bytes(self) -> int:
        """Bytes of one output's codes in a step."""
        return w.STEP // self.packing


def _int4(group, *, zero):
    arrays = (("block", 2), *([("zero", 1)] if zero else []))
    return Widening(2, w.int4_pairs, group, w.bf16_scales, arrays)


_FP8_BLOCK = Widening(1, w.e4m3_pairs, block=True)
WIDENINGS = {
    "mxfp4": Widening(2, w.e2m1_pairs, 32, w.e8m0_scales, (("block", 1),)),
    "nvfp4": Widening(2, w.e2m1_pairs, 16, w.e4m3_scales, (("block", 1),), outer="tensor"),
    "int4_32": _int4(32, zero=False),
    "int4_128": _int4(128, zero=False),
    "int4_32_zero": _int4(32, zero=True),
    "int4_128_zero": _int4(128, zero=True),
    "int8": Widening(1, w.int8_pairs, outer="channel"),
    "fp8_block": _FP8_BLOCK,
    "fp8_block_pow2": _FP8_BLOCK,
    "fp8_tensor": Widening(1, w.e4m3_pairs, outer="tensor"),
    "fp8_channel": Widening(1, w.e4m3_pairs, outer="channel"),
}


def widened(
    m,
    how: Widening,
    codes: Sequence[Any],
    memories: dict[str, Any],
    k: int,
    step,
    block_scale=None,
) -> list:
    """The fragments of A of one step, [16 times 8 along K, 2 times 8 outputs], as words.

    Args:
        m: the machine.
        how: the format's widening.
        codes: the thread's words, [blocks of 16 bytes along K, 2 times 8 outputs].
        memories: where the scales of the 64 outputs are, by name: [64, row_bytes].
        k: K of the weight.
        step: index of the step, a word.
        block_scale: the float32 scale of a format with blocks.
    """
    out: dict[tuple[int, int], Any] = {}
    for row_half in range(2):
        scales = _scales(m, how, memories, k, step, row_half)
        for block, word in enumerate(codes[row_half::2]):
            count = 2 * how.packing
            eights = range(count * block, count * (block + 1))
            pairs = _pairs(m, how, word, scales, eights, block_scale)
            out |= {(eight, row_half): pair for eight, pair in zip(eights, pairs, strict=True)}
    return [out[eight, row_half] for eight in range(w.STEP // 8) for row_half in range(2)]


def _pairs(m, how, word, scales, eights, block_scale):
    """The pairs of one word, times their scales."""
    if how.group is None:
        word = w.swapped_halves(m, word)
        return how.pairs(m, word, block_scale) if how.block else how.pairs(m, word)
    own = [scales[8 * eight // how.group] for eight in eights]
    zeros = [] if how.pairs is w.e2m1_pairs else [own[0][1]]
    values = how.pairs(m, word, *zeros)
    return [m.mul_bf16(value, scale) for value, (scale, _) in zip(values, own, strict=True)]


def _scales(m, how, memories, k, step, row_half):
    """(scale, zero point plus 128) of each group in a step, for one output."""
    if how.group is None:
        return []
    found = {}
    for name, size in how.item_bytes:
        make = w.biased_zeros if name == "zero" else how.scales
        found[name] = _loaded(m, make, memories[name], size, how.group, how.row_bytes(k)[name], step, row_half)
    return list(zip(found["block"], found.get("zero", [BIASED_ZERO] * len(found["block"])), strict=True))


def _loaded(m, make, memory, size, group, row_bytes, step, row_half):
    """The results of `make` for an output's scales in a step. A half beyond the end of K gets the last scales."""
    row = m.row(row_half) * row_bytes
    if group > HALF:
        return make(m, m.load(memory, row + step * (size * w.STEP // group), size))[: w.STEP // group]
    half_bytes, found = size * HALF // group, []
    for half in range(2):
        offset = (step * 2 + half) * half_bytes
        if row_bytes // half_bytes % 2 and half:
            offset = m.least(offset, row_bytes - half_bytes)
        found += make(m, m.load(memory, row + offset, half_bytes))
    return found


def lines(how: Widening, k: int) -> dict[str, int]:
    """Lines of 64 bytes that hold the scales of 64 outputs, by name. They are contiguous in memory."""
    return {name: ROWS * size // 64 for name, size in how.row_bytes(k).items()}


def aligned_lines(how: Widening, k: int) -> dict[str, int]:
    """The same in shared memory, where TMA writes to multiples of 128 bytes."""
    return {name: count + count % 2 for name, count in lines(how, k).items()}
