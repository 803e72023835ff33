"""Widening of codes to bfloat16 in registers: integer arithmetic on 32-bit words, as one thread of a warpgroup does it.

A thread's words are fragments of codes [64, bytes of K] as TMA has stored them. The results are fragments of the A
operand of wgmma (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"): two neighbours along K in each word.
The functions take a machine, which has the instructions: `ptx.Ptx` emits them, and tests run them in NumPy.

A word of 4-bit codes holds the thread's own pairs already (`formats.packing`). Bytes are exchanged between threads as
in Mosaic's layout WGMMA_UPCAST_2X (jax.experimental.mosaic.gpu, fragmented_array.py). Integers are embedded in bfloat16
as in CUTLASS (numeric_conversion.h).
"""

from jax_latent_moe.formats import packing

STEP = 128
"""Elements of K that are widened at a time."""

E2M1_FACTOR, E2M1_LAST, E2M1_BITS = map(int, (packing.E2M1_FACTOR, packing.E2M1_LAST, packing.E2M1_BITS))
TWO_TO_126, TWO_TO_120 = 0x7E807E80, 0x7B807B80
"""Pairs of bfloat16. They undo the bias of E2M1, or E4M3, whose exponent and mantissa are read as a bfloat16's."""


def swapped_halves(m, word):
    """Two threads exchange half of their words: the even one keeps its lower half, the odd one its upper half."""
    return m.prmt(word, m.from_lane(word, 1), m.of_lane_bit(0, 0x5410, 0x3276))


def e2m1_pairs(m, word):
    """The values of eight E2M1 codes. Exponent and mantissa, read as a bfloat16's, are the value times 2^-126."""
    placed = [word, m.rotated_right(word, 3), m.rotated_right(word, 6), (word & E2M1_LAST) * E2M1_FACTOR]
    return [m.mul_bf16(pair & E2M1_BITS, TWO_TO_126) for pair in placed]


def int4_pairs(m, word, biased_zero):
    """Eight unsigned codes minus a zero point.

    The code is embedded in the mantissa of 128, and the zero point, plus 128, is subtracted.
    """
    return [m.sub_bf16(word >> 4 * j & 0x000F000F | 0x43004300, biased_zero) for j in range(4)]


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
    """Four E4M3 scales, each as a pair of equal bfloat16. If one is NaN, some are.

    The scales are those of one output, which one NaN spoils anyhow.
    """
    values = []
    for shift in (0, 8):
        sizes, signs = (word >> shift & mask for mask in (0x007F007F, 0x00800080))
        nans = m.if_nonzero(sizes + 0x00010001 & 0x00800080, 0x7FC07FC0)
        values.append(m.mul_bf16(sizes << 4, TWO_TO_120) | signs << 8 | nans)
    return [m.prmt(pair, pair, select) for select in (0x1010, 0x3232) for pair in values]


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
