"""Where four-bit codes are in 32-bit words, bit by bit (jax_latent_moe/formats/packing.py)."""

import numpy as np

E2M1 = ((6, 7, 8, 15), (9, 10, 11, 18), (12, 13, 14, 21), (4, 0, 1, 3))
INTEGERS = tuple(tuple(range(4 * pair, 4 * pair + 4)) for pair in range(4))
"""The place of each bit of a pair's first code, from the lowest bit on. The second code is 16 bits further."""


def place(k, size):
    """(word, pair, which of the pair) of code k of an axis of so many codes."""
    first = k // 32 * 32
    words = 4 if first + 32 <= size else 2
    pair, within = divmod(k - first, 2 * words)
    return first // 8 + within // 2, pair, within % 2


def codes_of(packed, places):
    """Codes [..., K] of the bytes of words [..., K / 2]."""
    words = np.ascontiguousarray(packed).view(np.uint8).view("<u4")
    codes = np.zeros((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    for k in range(codes.shape[-1]):
        word, pair, second = place(k, codes.shape[-1])
        for bit, at in enumerate(places[pair]):
            codes[..., k] |= ((words[..., word] >> (at + 16 * second) % 32 & 1) << bit).astype(np.uint8)
    return codes


def word_of(codes, places):
    """The word of eight codes, by pairs."""
    word = 0
    for index, code in enumerate(codes):
        for bit, at in enumerate(places[index // 2]):
            word |= (int(code) >> bit & 1) << (at + 16 * (index % 2)) % 32
    return word
