"""Widening of codes to bfloat16 in registers: integer arithmetic on 32-bit words, as one thread of a warpgroup does it.

A thread's words are fragments of codes [64, bytes of K] as TMA has stored them. The results are fragments of the A
operand of wgmma (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"): two neighbours along K in each word.
The functions take a machine, which has the instructions: `ptx.Ptx` emits them, and tests run them in NumPy.

The byte permutations between threads are those of Mosaic's layouts WGMMA_UPCAST_2X and 4X (jax.experimental.mosaic.gpu,
fragmented_array.py). The embedding of integers in bfloat16 is that of CUTLASS (numeric_conversion.h).
"""

import numpy as np

STEP = 128
"""Elements of K that are widened at a time."""

EVEN_PAIR, ODD_PAIR = 0x5140, 0x7362
"""Selectors of prmt that interleave the lower, or the upper, two bytes of two words."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_BIAS = 120
"""The exponent and mantissa of an E4M3 number, read as those of a bfloat16, are that number times 2^-120."""


def transposed_quads(m, word):
    """Four threads hold 4 x 4 bytes, each a row of them. Afterwards each holds a column."""
    word = m.prmt(word, m.from_lane(word, 1), m.of_lane_bit(0, 0x6240, 0x3715))
    return m.prmt(word, m.from_lane(word, 2), m.of_lane_bit(1, 0x5410, 0x3276))


def swapped_halves(m, word):
    """Two threads exchange half of their words: the even one keeps its lower half, the odd one its upper half."""
    return m.prmt(word, m.from_lane(word, 1), m.of_lane_bit(0, 0x5410, 0x3276))


def _tables(exponent):
    """The bytes of the bfloat16 values of E2M1 times 2^exponent: (upper of codes 0-3, of 4-7, lower of 0-3, of 4-7)."""
    bits = (np.float32(E2M1) * np.float32(2.0**exponent)).view(np.uint32) >> 16
    places = np.uint32([0, 8, 16, 24])
    return [int(np.sum(part << places)) for part in (bits[:4] >> 8, bits[4:] >> 8, bits[:4] & 255, bits[4:] & 255)]


def e2m1_pairs(m, word, exponent=0):
    """The values of eight E2M1 codes times 2^exponent, as four pairs of bfloat16. prmt looks up four at a time."""
    upper_tables, lower_tables = _tables(exponent)[:2], _tables(exponent)[2:]
    sizes, shifted = word & 0x77777777, word << 4
    pairs = []
    for half, interleave in enumerate((EVEN_PAIR, ODD_PAIR)):
        select = sizes >> 16 * half
        signs = m.prmt(shifted, word, interleave) & 0x80808080
        upper, lower = m.prmt(*upper_tables, select) | signs, m.prmt(*lower_tables, select)
        pairs += [m.prmt(lower, upper, EVEN_PAIR), m.prmt(lower, upper, ODD_PAIR)]
    return pairs


def int4_pairs(m, word, biased_zero):
    """Eight unsigned codes minus a zero point, as four pairs of bfloat16.

    The code is embedded in the mantissa of 128, and the zero point, plus 128, is subtracted.
    """
    odd = word >> 4
    nibbles = [m.prmt(word, odd, j | j << 4 | (4 + j) << 8 | (4 + j) << 12) for j in range(4)]
    return [m.sub_bf16(pair & 0x000F000F | 0x43004300, biased_zero) for pair in nibbles]


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
    """Four positive E4M3 scales times 2^-120, each as a pair of equal bfloat16. One that is NaN makes the first NaN.

    The scales are those of one output, which one NaN spoils anyhow.
    """
    even, odd = word << 4 & 0x07F007F0, word >> 4 & 0x07F007F0
    nans = (word & 0x7F7F7F7F) + 0x01010101 & 0x80808080
    even = even | m.if_nonzero(nans, 0x7FC07FC0)
    return [m.prmt(part, part, select) for select in (0x1010, 0x3232) for part in (even, odd)]


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
