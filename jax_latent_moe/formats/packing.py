"""Codes of four bits in the order of the GPU kernels: eight in a word of 32 bits, which few instructions widen.

32 codes along K make four words. Pair j of word w is the codes 8 j + 2 w and 8 j + 2 w + 1, so that the word has what one
thread holds in two products of tensor cores (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"). 16 codes
behind the last 32 make two words, with the codes 4 j + 2 w and 4 j + 2 w + 1. The first code of a pair is in the lower
half of the word, and the second at the same bits of the upper half:

- Integers have pair j at the bits from 4 j on.
- E2M1 codes have a sign s, two bits e of exponent and a bit m. Pair 0 has s, e, e, m at bits 15, 8, 7 and 6, as
  bfloat16 does. Pairs 1 and 2 are there after the word is rotated right by 3 and by 6 bits. Pair 3 has bits 3, 1, 0 and
  4, and is there after the word is multiplied by 0x1084.

The functions take arrays of JAX or of NumPy, unless they say otherwise.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8

GROUP = 32
"""Codes along K whose order changes. A part of K must begin at a multiple of it."""
E2M1_FACTOR, E2M1_LAST, E2M1_BITS = np.uint32(0x1084), np.uint32(0x001B001B), np.uint32(0x81C081C0)
"""What brings pair 3 of a word to its place, the bits of pair 3, and the place of a pair."""


def pack_integers(codes: UInt8[Array, "*s k"]) -> UInt8[Array, "*s half"]:
    """Integers below 16, in bytes, as bytes of words. K is a multiple of 16."""
    pairs = _pairs(codes)
    return _bytes(pairs[0] | pairs[1] << 4 | pairs[2] << 8 | pairs[3] << 12)


def unpack_integers(packed: UInt8[Array, "*s half"]) -> UInt8[Array, "*s k"]:
    """The codes of `pack_integers`."""
    words = _words(packed)
    return _codes([words >> 4 * j & 0x000F000F for j in range(4)])


def pack_e2m1(codes: UInt8[Array, "*s k"]) -> UInt8[Array, "*s half"]:
    """E2M1 codes, in bytes, as bytes of words. K is a multiple of 16."""
    return _bytes(e2m1_word(_pairs(codes)))


def unpack_e2m1(packed: UInt8[Array, "*s half"]) -> UInt8[Array, "*s k"]:
    """The codes of `pack_e2m1`."""
    words = _words(packed)
    placed = [_rotated_right(words, 3 * j) & E2M1_BITS for j in range(3)]
    placed.append((words & E2M1_LAST) * E2M1_FACTOR & E2M1_BITS)
    return _codes([pair >> 6 & 0x00070007 | pair >> 12 & 0x00080008 for pair in placed])


def e2m1_word(pairs: Any) -> Any:
    """The words of four pairs each. A pair has its codes in the lowest bits of both halves."""
    *first, last = pairs
    word = last & 0x00080008 | last >> 1 & 0x00030003 | (last & 0x00010001) << 4
    for j, pair in enumerate(first):
        placed = (pair & 0x00070007) << 6 | (pair & 0x00080008) << 12
        word = word | _rotated_right(placed, -3 * j % 32)
    return word


def _rotated_right(words, count):
    return words >> count | words << 32 - count if count else words


def _pairs(codes):
    """Pair 0, 1, 2 and 3 of each word [..., words], the first code in the lower half."""
    *leading, k = codes.shape
    whole, by_word = k // GROUP * GROUP, []
    for part, count in ((codes[..., :whole], GROUP // 8), (codes[..., whole:], 2)):
        groups = part.reshape(*leading, part.shape[-1] // (8 * count), 4, count, 2)
        by_word.append(groups.swapaxes(-3, -2).reshape(*leading, part.shape[-1] // 8, 4, 2))
    halves = jnp.concatenate(by_word, axis=-3).astype(jnp.uint32)
    return jnp.moveaxis(halves[..., 0] | halves[..., 1] << 16, -1, 0)


def _codes(pairs):
    """The codes of four pairs of each word: the inverse of `_pairs`."""
    words = jnp.stack(pairs, axis=-1)
    *leading, count, _ = words.shape
    halves = jnp.stack([words & 15, words >> 16], axis=-1).astype(jnp.uint8)
    whole, by_group = count * 8 // GROUP * (GROUP // 8), []
    for part, size in ((halves[..., :whole, :, :], GROUP // 8), (halves[..., whole:, :, :], 2)):
        groups = part.reshape(*leading, part.shape[-3] // size, size, 4, 2)
        by_group.append(groups.swapaxes(-3, -2).reshape(*leading, part.shape[-3] * 8))
    return jnp.concatenate(by_group, axis=-1)


def _bytes(words):
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])


def _words(packed):
    return lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], packed.shape[-1] // 4, 4), jnp.uint32)
