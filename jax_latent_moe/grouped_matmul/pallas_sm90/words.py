"""Widening of codes to bfloat16 in registers: integer arithmetic on 32-bit words, as one thread of a warpgroup does it.

A thread's words are fragments of codes [64, bytes of K] as TMA has stored them. The results are fragments of the A
operand of wgmma (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"): two neighbours along K in each word.
The functions take a machine, which has the instructions: `ptx.Ptx` emits them, and tests run them in NumPy.

The byte permutations between threads are those of Mosaic's layouts WGMMA_UPCAST_2X and 4X (jax.experimental.mosaic.gpu,
fragmented_array.py). Integers are embedded in bfloat16 as in CUTLASS (numeric_conversion.h).
"""

import numpy as np

STEP = 128
"""Elements of K that are widened at a time."""

EVEN_PAIR, ODD_PAIR = 0x5140, 0x7362
"""Selectors of prmt that interleave the lower, or the upper, two bytes of two words."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TWO_TO_126, TWO_TO_120 = 0x7E807E80, 0x7B807B80
"""Pairs of bfloat16. They undo the bias of E2M1, or E4M3, whose exponent and mantissa are read as a bfloat16's."""


def transposed_quads(m, word):
    """Four threads hold 4 x 4 bytes, each a row of them. Afterwards each holds a column."""
    word = m.prmt(word, m.from_lane(word, 1), m.of_lane_bit(0, 0x6240, 0x3715))
    return m.prmt(word, m.from_lane(word, 2), m.of_lane_bit(1, 0x5410, 0x3276))


def swapped_halves(m, word):
    """Two threads exchange half of their words: the even one keeps its lower half, the odd one its upper half."""
    return m.prmt(word, m.from_lane(word, 1), m.of_lane_bit(0, 0x5410, 0x3276))


def _bytes(upper):
    """Tables of the upper, or lower, bytes of the bfloat16 values of E2M1: those of codes 0 to 3, and of 4 to 7."""
    bits = np.asarray(E2M1, np.float32).view(np.uint32) >> (24 if upper else 16) & 255
    return [sum(int(byte) << 8 * place for place, byte in enumerate(part)) for part in (bits[:4], bits[4:])]


def e2m1_pairs(m, word):
    """The values of eight E2M1 codes as four pairs of neighbours. prmt looks up four bytes at a time."""
    sizes, shifted = word & 0x77777777, word << 4
    pairs = []
    for half, interleave in enumerate((EVEN_PAIR, ODD_PAIR)):
        select = sizes >> 16 * half
        signs = m.prmt(shifted, word, interleave) & 0x80808080
        upper, lower = m.prmt(*_bytes(upper=True), select) | signs, m.prmt(*_bytes(upper=False), select)
        pairs += [m.prmt(lower, upper, EVEN_PAIR), m.prmt(lower, upper, ODD_PAIR)]
    return pairs


def e2m1_pairs_apart(m, word):
    """The values of eight E2M1 codes as four pairs of codes that are four apart: only shifts bring them into place.

    Exponent and mantissa, read as a bfloat16's, are the value times 2^-126.
    """
    pairs = []
    for i in range(4):
        left = 6 - 4 * i
        sizes = (word << left if left > 0 else word >> -left) & 0x01C001C0
        pairs.append(m.mul_bf16(sizes | word << 12 - 4 * i & 0x80008000, TWO_TO_126))
    return pairs


def int4_pairs(m, word, biased_zero):
    """Eight unsigned codes minus a zero point, as four pairs of bfloat16.

    The code is embedded in the mantissa of 128, and the zero point, plus 128, is subtracted.
    """
    odd = word >> 4
    nibbles = [m.prmt(word, odd, j | j << 4 | (4 + j) << 8 | (4 + j) << 12) for j in range(4)]
    return [m.sub_bf16(pair & 0x000F000F | 0x43004300, biased_zero) for pair in nibbles]


def int4_pairs_apart(m, word, biased_zero):
    """The same as four pairs of codes that are four apart."""
    return [m.sub_bf16(word >> 4 * i & 0x000F000F | 0x43004300, biased_zero) for i in range(4)]


def int8_pairs(m, word):
    """Four signed codes as two pairs of bfloat16: 128 plus the lower seven bits, minus 128 plus the sign bit twice."""
    pairs = [m.prmt(word, 0x43, select) for select in (0x4140, 0x4342)]
    return [m.sub_bf16(pair & 0xFF7FFF7F, pair & 0xFF80FF80) for pair in pairs]


def e4m3_pairs(m, word, scale=None):
    """Four E4M3 codes, times a float32 scale, each rounded to bfloat16 once, as two pairs."""
    pairs = []
    for half in range(2):
        values = m.e4m3_to_float32(word >> 16 * half)
        pairs.append(m.to_bf16_pair(*(value if scale is None else m.mul_float32(value, scale) for value in values)))
    return pairs


def e4m3_scales(m, word):
    """Four positive E4M3 scales, each as a pair of equal bfloat16. If one is NaN, some are.

    The scales are those of one output, which one NaN spoils anyhow.
    """
    even, odd = (_e4m3_values(m, part & 0x007F007F) for part in (word, word >> 8))
    return [m.prmt(part, part, select) for select in (0x1010, 0x3232) for part in (even, odd)]


def e4m3_scales_apart(m, word):
    """The same for `e2m1_pairs_apart`: of two scales for 32 codes, a thread needs the scale of its own eight."""
    return _twice_each(m, _e4m3_values(m, m.prmt(word, 0, m.of_lane_bit(1, 0x4240, 0x4341)) & 0x007F007F))


def _e4m3_values(m, pair):
    """Two E4M3 numbers without sign, in the lower seven bits of each half, as bfloat16; NaN if either is NaN."""
    nans = m.if_nonzero(pair + 0x00010001 & 0x00800080, 0x7FC07FC0)
    return m.mul_bf16(pair << 4, TWO_TO_120) | nans


def e8m0_scales(m, word):
    """Two powers of two, from the lower two bytes of the word, each as a pair of equal bfloat16.

    The byte u is 2^(u - 127). For 0 that is subnormal, and 255 is NaN: both have the upper bit of the mantissa set.
    """
    exponents = m.prmt(word, 0, 0x4140)
    odd_ones = (exponents + 0x00010001 | 0x01000100 - exponents) & 0x01000100
    return _twice_each(m, exponents << 7 | odd_ones >> 2)


def bf16_scales(m, word):
    """Two bfloat16 scales, each as a pair of equal ones."""
    return _twice_each(m, word)


def biased_zeros(m, word):
    """Two zero points plus 128, from the lower two bytes of the word, each as a pair of equal bfloat16."""
    return _twice_each(m, m.prmt(word, 0, 0x4140) | 0x43004300)


def _twice_each(m, word):
    return [m.prmt(word, word, select) for select in (0x1010, 0x3232)]
