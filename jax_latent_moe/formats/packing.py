"""The order of 4-bit codes: eight in a word of 32 bits, which GPU kernels widen in few instructions.

32 codes along K are stored in four words. Pair j of word w is the codes 8 j + 2 w and 8 j + 2 w + 1, so a word holds
what one thread needs for two products of tensor cores (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"). If
K ends in 16 more codes, they are stored in two words, and pair j of word w is the codes 4 j + 2 w and 4 j + 2 w + 1.

The first code of a pair is in the lower half of the word. The second is at the same bits of the upper half:

- Pair j of integers is at the bits from 4 j on.
- E2M1 codes have a sign s, two bits e of exponent and a bit m. Pair 0 has s, e, e, m at bits 15, 8, 7 and 6, as
  bfloat16 does. Rotating the word right by 3 bits brings pair 1 there, and rotating it by 6 bits brings pair 2. Pair 3
  has s, e, e, m at bits 3, 1, 0 and 4, and multiplying the word by 0x1084 brings it there.

The least significant byte of a word comes first.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8

GROUP = 32
"""Codes along K whose order changes. A part of K must begin at a multiple of it."""
E2M1_FACTOR, E2M1_LAST, E2M1_BITS = np.uint32(0x1084), np.uint32(0x001B001B), np.uint32(0x81C081C0)
"""The factor that brings pair 3 of a word to its place, the bits of pair 3 before it, and the bits of a pair there."""


def pack_integers(codes: UInt8[Array, "*s k"]) -> UInt8[Array, "*s half"]:
    """The lower four bits of integers, in bytes, as bytes of words. K is a multiple of 16."""
    pairs = _pairs(codes & 15)
    return _bytes(pairs[0] | pairs[1] << 4 | pairs[2] << 8 | pairs[3] << 12)


def unpack_integers(packed: UInt8[Array, "*s half"]) -> UInt8[Array, "*s k"]:
    """The codes of `pack_integers`."""
    return _codes(packed, lambda words, pair: words >> 4 * pair)


def pack_e2m1(codes: UInt8[Array, "*s k"]) -> UInt8[Array, "*s half"]:
    """E2M1 codes, in bytes, as bytes of words. K is a multiple of 16."""
    return _bytes(e2m1_words(_pairs(codes)))


def pack_plain_e2m1(plain: UInt8[Array, "*s half"]) -> UInt8[Array, "*s half"]:
    """E2M1 codes in the order of checkpoints (`plain_packing`), as `pack_e2m1` stores them."""
    *leading, width = plain.shape
    whole, parts = width // (GROUP // 2) * (GROUP // 2), []
    for part, words in ((plain[..., :whole], 4), (plain[..., whole:], 2)):
        if part.shape[-1] or not width:
            # Byte 4 j + w of a group is pair j of word w.
            codes = part.reshape(*leading, part.shape[-1] // (4 * words), 4, words).astype(jnp.uint32)
            pairs = codes & 15 | codes >> 4 << 16
            placed = e2m1_words([pairs[..., j, :] for j in range(4)])
            parts.append(_bytes(placed.reshape(*leading, part.shape[-1] // 4)))
    return _joined(parts)


def unpack_e2m1(packed: UInt8[Array, "*s half"]) -> UInt8[Array, "*s k"]:
    """The codes of `pack_e2m1`."""
    return _codes(packed, _e2m1_pair)


def e2m1_words(pairs: Any) -> Any:
    """The words of pairs 0 to 3, uint32 of JAX or NumPy. A pair has its codes in the lowest bits of both halves."""
    *first, last = pairs
    words = last & 0x00080008 | last >> 1 & 0x00030003 | (last & 0x00010001) << 4
    for j, pair in enumerate(first):
        placed = (pair & 0x00070007) << 6 | (pair & 0x00080008) << 12
        words = words | _rotated_right(placed, -3 * j % 32)
    return words


def e2m1_pairs(words: Any) -> list[Any]:
    """The pairs of `e2m1_words`."""
    placed = [_rotated_right(words, 3 * j) & E2M1_BITS for j in range(3)]
    placed.append((words & E2M1_LAST) * E2M1_FACTOR & E2M1_BITS)
    return [pair >> 6 & 0x00070007 | pair >> 12 & 0x00080008 for pair in placed]


def _rotated_right(words, count):
    return words >> count | words << 32 - count if count else words


def _e2m1_pair(words, pair):
    """The pair of `e2m1_pairs` whose number is in an array."""
    count = 3 * pair
    placed = (
        jnp.where(pair == 3, (words & E2M1_LAST) * E2M1_FACTOR, words >> count | words << (-count & 31)) & E2M1_BITS
    )
    return placed >> 6 & 0x00070007 | placed >> 12 & 0x00080008


def _pairs(codes):
    """Pairs 0, 1, 2 and 3 of the words [..., K / 8], as for `e2m1_words`."""
    *leading, k = codes.shape
    whole, by_word = k // GROUP * GROUP, []
    for part, words in ((codes[..., :whole], 4), (codes[..., whole:], 2)):
        groups = part.reshape(*leading, part.shape[-1] // (8 * words), 4, words, 2)
        by_word.append(groups.swapaxes(-3, -2).reshape(*leading, part.shape[-1] // 8, 4, 2))
    halves = jnp.concatenate(by_word, axis=-3).astype(jnp.uint32)
    return jnp.moveaxis(halves[..., 0] | halves[..., 1] << 16, -1, 0)


def _codes(packed, pair_of):
    """The codes in words: the inverse of `_pairs`. pair_of(words, number) has a pair in its lowest bits.

    Each code is computed from its own word. So XLA joins this with what comes next, and transposes nothing.
    """
    words = _words(packed)
    *leading, count = words.shape
    # Kernels in Pallas take no constant arrays, so these are computed.
    ones = (1,) * len(leading)
    number = lax.broadcasted_iota(jnp.uint32, (*ones, 1, 4, 1, 1), len(ones) + 1)
    half = lax.broadcasted_iota(jnp.uint32, (*ones, 1, 1, 1, 2), len(ones) + 3)
    whole, parts = count // 4 * 4, []
    for part, size in ((words[..., :whole], 4), (words[..., whole:], 2)):
        if part.shape[-1] or not count:
            groups = part.reshape(*leading, part.shape[-1] // size, 1, size, 1)
            halves = pair_of(groups, number) >> 16 * half & 15
            parts.append(halves.astype(jnp.uint8).reshape(*leading, part.shape[-1] * 8))
    return _joined(parts)


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _bytes(words):
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])


def _words(packed):
    return lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], packed.shape[-1] // 4, 4), jnp.uint32)
