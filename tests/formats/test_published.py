"""Encode and decode of every format, bit for bit against its published definition (tests/oracle/formats.py)."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_latent_moe.formats import FORMATS, ScaledArray, encode, fp4, fp8
from tests.oracle import formats as oracle

N, K = 6, 256
every_format = pytest.mark.parametrize("name", oracle.ENCODERS)


@functools.cache
def compiled(name):
    """Values [..., K, N] -> (codes, scales, decoded values), in one jitted call for each format."""

    def run(values):
        array = encode(values, name)
        return array.codes, array.scales, array.decode("float32")

    return jax.jit(run)


def grids(rng):
    """Values that lie on codes of E4M3, E2M1 and integers, or halfway between two, below a largest of 448 * 2^e."""
    e4m3 = np.sort(np.unique(oracle.E4M3_VALUES[np.isfinite(oracle.E4M3_VALUES)]))
    half = np.concatenate([e4m3, (e4m3[1:] + e4m3[:-1]) / 2])
    steps = rng.integers(-30, 31, (N, K)) / 2  # 7.5 and 6 are largest values of INT4 and E2M1
    return {
        "ties of E4M3": np.where(np.arange(K) % 16, rng.choice(half, (N, K)), 448.0) * 2.0**-5,
        "ties of E2M1": np.where(np.arange(K) % 16, rng.integers(-24, 25, (N, K)) / 4, 6.0),
        "ties of INT4": np.where(np.arange(K) % 16, np.clip(steps, -7.5, 7.5), 7.5),
        "ties of INT8": np.where(np.arange(K) % 16, rng.integers(-254, 255, (N, K)) / 2, 127.0),
    }


def drawn(rng):
    """Matrices [N, K] by what is special about them."""
    normal = rng.normal(size=(N, K))
    few = np.where(rng.random((N, K)) < 0.1, normal, 0)
    few[1] = 0
    signed = np.where(rng.random((N, K)) < 0.5, -0.0, normal)
    return grids(rng) | {
        "normal": normal,
        "wide range": normal * 10.0 ** rng.uniform(-6, 6, (N, K)),
        "zeros": few,
        "all zero": np.zeros((N, K)),
        "negative zeros": signed,
        "positive": np.abs(normal),
        "tiny": normal * 1e-20,
        "huge": normal / np.abs(normal).max() * 3.4e38,
    }


@every_format
def test_codes_scales_and_values_are_those_of_the_definition(name, rng):
    for kind, matrix in drawn(rng).items():
        matrix = matrix.astype(np.float32)
        codes, scales, values = compiled(name)(matrix.T)
        with np.errstate(all="ignore"):
            wanted, wanted_scales = oracle.ENCODERS[name](matrix)
            wanted_values = oracle.decode(name, wanted, wanted_scales)
        np.testing.assert_array_equal(codes[0], oracle.packed(name, wanted), kind)
        assert set(scales) == set(wanted_scales)
        for part, scale in scales.items():
            assert scale.dtype == wanted_scales[part].dtype, part
            np.testing.assert_array_equal(scale[0], wanted_scales[part], f"{kind}: {part}")
        np.testing.assert_array_equal(np.float64(values).T, wanted_values, kind)
        if kind != "tiny":
            np.testing.assert_array_equal(np.signbit(values).T, np.signbit(wanted_values), kind)


@every_format
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_block_with_nan_or_infinity_decodes_to_nan(name, poison, rng):
    """The whole matrix if it has its own scale; other blocks keep their values."""
    matrix = rng.normal(size=(N, K)).astype(np.float32)
    clean = np.asarray(compiled(name)(matrix.T)[2])
    matrix[2, 5] = poison
    values = np.asarray(compiled(name)(matrix.T)[2])
    k, n = FORMATS[name].block
    spoiled = np.zeros((K, N), bool)
    spoiled[: k or K, slice(None) if n in (None, 128) else slice(2, 3)] = True
    if name == "nvfp4":
        spoiled[:] = True
    assert np.isnan(values[spoiled]).all()
    np.testing.assert_array_equal(values[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_pow2"])
def test_partial_blocks(name, rng):
    """DeepSeek-V3's weights have sizes that 128 does not divide: the last blocks are smaller."""
    matrix = rng.normal(size=(300, 130)).astype(np.float32) * np.linspace(0.1, 4, 130, dtype=np.float32)
    array = encode(matrix.T, name)
    wanted, scales = oracle.ENCODERS[name](matrix)
    assert scales["block"].shape == (3, 2)
    np.testing.assert_array_equal(array.codes[0], wanted)
    np.testing.assert_array_equal(array.scales["block"][0], scales["block"])
    np.testing.assert_array_equal(np.float64(array.decode("float32")).T, oracle.decode(name, wanted, scales, 128))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_rows_of_tokens(power_of_two, rng):
    # Gradients are as small as 1e-12, and must not vanish.
    rows = (rng.normal(size=(5, 300)) * 10.0 ** np.array([[-12], [-3], [0], [2], [9]])).astype(ml_dtypes.bfloat16)
    rows[1, :128] = 0
    codes, scales = fp8.encode_rows(jnp.asarray(rows), power_of_two=power_of_two)
    wanted, wanted_scales = oracle.fp8_block(rows.astype(np.float32), power_of_two, n_block=1, least=1e-30)
    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_array_equal(scales["block"], wanted_scales["block"])
    values = oracle.E4M3_VALUES[wanted] * np.repeat(np.float64(wanted_scales["block"]), 128, axis=1)[:, :300]
    np.testing.assert_array_equal(fp8.decode_rows(codes, scales, "float32"), values.astype(np.float32))


@every_format
def test_strict_promotion(name):
    """These modes refuse operations while the functions are traced."""
    values = jax.ShapeDtypeStruct((2, K, N), "bfloat16")
    for mode in (jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")):
        with mode:
            decoded = jax.eval_shape(lambda values: encode(values, name).decode("bfloat16"), values)
        assert (decoded.shape, decoded.dtype) == (values.shape, values.dtype)


def test_every_code():
    """Every E4M3 byte, every E2M1 code, every E8M0 scale but the two whose values float32 cannot hold."""
    bytes_ = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(fp8.from_e4m3(jnp.asarray(bytes_)), oracle.E4M3_VALUES.astype(np.float32))
    values = np.asarray(fp4.from_e2m1(jnp.arange(16, dtype=jnp.uint8)))
    np.testing.assert_array_equal(values, oracle.E2M1)
    np.testing.assert_array_equal(np.signbit(values), np.arange(16) > 7)
    scale = np.concatenate([np.arange(3, 253), [255]]).astype(np.uint8)
    codes = oracle.packed("mxfp4", np.tile(np.uint8([0xA, 7]), (1, len(scale), 16)))  # -1 and 6
    array = ScaledArray(jnp.asarray(codes), {"block": jnp.asarray(scale[None, :, None])}, "mxfp4")
    power = np.where(scale == 255, np.nan, 2.0 ** (scale.astype(float) - 127))
    wanted = np.tile([[-1.0], [6.0]], (16, 1)) * power
    np.testing.assert_array_equal(np.float64(array.decode("float32")), wanted)


@every_format
def test_matrices_side_by_side(name, rng):
    """Each has its own scales, and another compute dtype is rounded once."""
    values = (rng.normal(size=(2, K, 2 * N)) * np.repeat([1, 7], N)).astype(np.float32)

    @jax.jit
    def run(values):
        array = encode(values, name, parts=2)
        return array.shape, array[1].decode("float32"), array[1].decode("bfloat16")

    shape, wide, narrow = run(values)
    assert shape == (2, K, 2 * N)
    assert np.asarray(narrow).tobytes() == np.asarray(wide).astype(ml_dtypes.bfloat16).tobytes()
    for part in (slice(N), slice(N, 2 * N)):
        np.testing.assert_array_equal(wide[:, part], compiled(name)(values[1, :, part])[2])
