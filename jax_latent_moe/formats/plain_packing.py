"""E2M1 codes in the plain order of checkpoints to and from the order of `packing`, in NumPy.

In the plain order, a byte has two neighbours along K, the first in its low bits. They are a pair of `packing`: byte
4 j + w of 16 is pair j of word w. So the orders differ by a transposition of 4 x 4 bytes, and then by a permutation of
the bits of each word. A table has the results for all lower halves of a word, and another one for all upper halves.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from jax_latent_moe.formats.packing import GROUP, e2m1_pairs, e2m1_words

GROUP_BYTES = GROUP // 2
"""Bytes among which the order changes."""
CHUNK = 2**18
"""Bytes that are converted at a time: few enough for the cache, and enough that threads seldom wait for each other."""


def from_plain(plain: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
    """Codes in the order of `packing`.

    Args:
        plain: [..., K / 2], integers of one byte. K is a multiple of 16.
        columns: the bytes along K that are returned.
    """
    start, stop, _ = columns.indices(plain.shape[-1])
    first, last = start // GROUP_BYTES * GROUP_BYTES, -(-stop // GROUP_BYTES) * GROUP_BYTES
    return _converted(plain[..., first:last].view(np.uint8), _words_of)[..., start - first : stop - first]


def to_plain(codes: np.ndarray) -> np.ndarray:
    """The bytes that `from_plain` was given, from all that it returns."""
    return _converted(codes.view(np.uint8), _plain_of)


def _converted(codes, convert: Callable[[np.ndarray, int], np.ndarray]):
    *leading, width = codes.shape
    rows = codes.reshape(math.prod(leading), width)
    out, whole, step = np.empty(rows.shape, np.uint8), width // GROUP_BYTES * GROUP_BYTES, CHUNK // max(width, 1) + 1
    for columns, words in ((slice(0, whole), 4), (slice(whole, width), 2)):
        if columns.start < columns.stop:
            for first in range(0, len(rows), step):
                part = rows[first : first + step, columns]
                out[first : first + step, columns] = convert(part, words).reshape(part.shape)
    return out.reshape(codes.shape)


def _words_of(plain, count):
    """The words of groups of count words."""
    pairs = plain.reshape(-1, 4, count)
    words = np.empty((len(pairs), count, 4), np.uint8)
    for j in range(4):
        for word in range(count):  # one copy of all axes would take twice as long
            words[:, word, j] = pairs[:, j, word]
    return _looked_up(words, *_tables(_word_of_bytes)).view(np.uint8)


def _plain_of(packed, count):
    """The plain bytes of groups of count words."""
    words = _looked_up(np.ascontiguousarray(packed), *_tables(_bytes_of_word)).view(np.uint8).reshape(-1, count, 4)
    plain = np.empty((len(words), 4, count), np.uint8)
    for j in range(4):
        for word in range(count):
            plain[:, j, word] = words[:, word, j]
    return plain


def _looked_up(words, lower, upper):
    halves = words.reshape(-1).view(np.uint16)
    # Every number of 16 bits is an index; "wrap" saves the check.
    found = np.take(lower, halves[0::2], mode="wrap")
    found |= np.take(upper, halves[1::2], mode="wrap")
    return found


@functools.cache
def _tables(permute):
    """The words that a permutation of bits makes of all lower halves, and of all upper halves."""
    halves = np.arange(2**16, dtype=np.uint32)
    return permute(halves), permute(halves << 16)


def _word_of_bytes(words):
    """Words of `packing` from words whose byte j is pair j."""
    return e2m1_words([words >> 8 * j & 0xF | (words >> 8 * j + 4 & 0xF) << 16 for j in range(4)])


def _bytes_of_word(words):
    """The inverse of `_word_of_bytes`."""
    found = np.zeros_like(words)
    for j, pair in enumerate(e2m1_pairs(words)):
        found |= (pair & 0xF | pair >> 12 & 0xF0) << 8 * j
    return found
