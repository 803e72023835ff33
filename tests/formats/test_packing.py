"""The order of 4-bit codes against the oracle's, code by code, and against bytes worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, InputError, formats
from jax_latent_moe.formats import packing, plain_packing
from tests.oracle import formats as oracle

KINDS = {
    "int4_32": (packing.pack_integers, packing.unpack_integers),
    "mxfp4": (packing.pack_e2m1, packing.unpack_e2m1),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def plain_of(codes):
    """Neighbours in a byte, the first in the low bits."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


@every_kind
@pytest.mark.parametrize("k", [0, 16, 32, 48, 64, 2880, 2896])
def test_the_order_is_the_oracles(name, k, rng):
    codes = rng.integers(16, size=(2, 3, k)).astype(np.uint8)
    pack, unpack = KINDS[name]
    stored = oracle.packed(name, codes)
    np.testing.assert_array_equal(oracle.unpacked(name, stored), codes)
    found = pack(jnp.asarray(codes))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, stored)
    np.testing.assert_array_equal(unpack(jnp.asarray(stored)), codes)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4_32", "int4_128_zero"])
def test_codes_from_elsewhere(name, rng):
    """`pack` makes of codes and their scales what `encode` stores; `unpack` gives the codes back."""
    matrix = rng.normal(size=(8, 384)).astype(np.float32)
    codes, scales = oracle.ENCODERS[name](matrix)
    packed = formats.pack(codes, name)
    np.testing.assert_array_equal(packed, oracle.packed(name, codes))
    np.testing.assert_array_equal(formats.unpack(packed, name), codes)
    weight = formats.ScaledArray(packed[None], {key: jnp.asarray(scale)[None] for key, scale in scales.items()}, name)
    np.testing.assert_array_equal(np.float64(weight.decode("float32")).T, oracle.decode(name, codes, scales))


@pytest.mark.parametrize(
    ("codes", "name", "error", "message"),
    [
        (np.zeros((2, 32), np.uint8), "int8", ConfigError, "format='int8' must be one of mxfp4, nvfp4, int4_32, "),
        (np.zeros((2, 32), np.int8), "mxfp4", InputError, "codes of dtype int8 must be uint8: cast them"),
        (np.zeros((2, 40), np.uint8), "nvfp4", InputError, r"codes of shape \(2, 40\) .* multiple of 16, which nvfp4"),
        (np.uint8(0), "nvfp4", InputError, r"codes of shape \(\) must have a last axis"),
    ],
)
def test_what_cannot_be_packed(codes, name, error, message):
    with pytest.raises(error, match=message):
        formats.pack(codes, name)


def test_bytes_worked_out_by_hand():
    counted = np.arange(32, dtype=np.uint8) % 16
    # Word 0 has the pairs 0 1, 8 9, 0 1 and 8 9; word 1 has 2 3, 10 11, 2 3 and 10 11; and so on.
    words = "80809191 A2A2B3B3 C4C4D5D5 E6E6F7F7"
    assert bytes(np.asarray(packing.pack_integers(jnp.asarray(counted)))) == bytes.fromhex(words)
    assert bytes(oracle.packed("int4_32", counted)) == bytes.fromhex(words)
    few = np.zeros(16, np.uint8)
    # 16 codes: word 0 has the pairs 0 1, 4 5, 8 9 and 12 13.
    few[[0, 1, 4, 9, 12, 13]] = 0x1, 0xF, 0x9, 0x8, 0x6, 0xB
    # Bit 6; bits 31 and 24 to 22; bits 18 and 9; bit 5; bits 1 and 0; bits 20, 19 and 16.
    words = "6302DD81 00000000"
    assert bytes(np.asarray(packing.pack_e2m1(jnp.asarray(few)))) == bytes.fromhex(words)
    assert bytes(oracle.packed("mxfp4", few)) == bytes.fromhex(words)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (1, 16), (2, 3, 48), (700, 2880)], ids=str)
def test_plain_bytes_to_and_fro(shape, rng):
    codes = rng.integers(16, size=shape).astype(np.uint8)
    plain, stored = plain_of(codes), oracle.packed("mxfp4", codes)
    np.testing.assert_array_equal(plain_packing.from_plain(plain), stored)
    np.testing.assert_array_equal(plain_packing.to_plain(stored), plain)
    np.testing.assert_array_equal(packing.pack_plain_e2m1(jnp.asarray(plain)), stored)


def test_several_chunks(rng, monkeypatch):
    monkeypatch.setattr(plain_packing, "CHUNK", 100)
    codes = rng.integers(16, size=(11, 112)).astype(np.uint8)
    stored = oracle.packed("mxfp4", codes)
    np.testing.assert_array_equal(plain_packing.from_plain(plain_of(codes)), stored)
    np.testing.assert_array_equal(plain_packing.to_plain(stored), plain_of(codes))


@pytest.mark.parametrize("columns", [slice(0, 12), slice(8, 40), slice(16, 32), slice(37, 39), slice(5, 5)], ids=str)
def test_parts_of_plain_bytes(columns, rng):
    """A part may begin and end anywhere. A file may call its bytes signed."""
    codes = rng.integers(16, size=(3, 80)).astype(np.uint8)
    wanted = oracle.packed("mxfp4", codes)[:, columns]
    np.testing.assert_array_equal(plain_packing.from_plain(plain_of(codes).view(np.int8), columns), wanted)
