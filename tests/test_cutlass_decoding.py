"""Gradients of rows through codes without a GPU: the kernel that decodes a weight, and the product after it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import InputError
from jax_latent_moe.formats import FORMATS, ScaledArray, encode
from jax_latent_moe.grouped_matmul import GatheredRows, Operand, Operands, Outputs, problem, reference
from jax_latent_moe.grouped_matmul.cutlass_sm90 import decoding
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES
from jax_latent_moe.grouped_matmul.operands import gathered
from tests import emulated, emulated_decoding
from tests.kernels import H200, WHOLE
from tests.oracle import formats as oracle
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
every_format = pytest.mark.parametrize("name", CODES)
WHOLE_H200 = dataclasses.replace(H200, kernels=tuple(WHOLE.kernels.items()))


@pytest.fixture(autouse=True)
def emulates(monkeypatch):
    monkeypatch.setattr(decoding.native, "call", emulated_decoding.call)


def float64(array):
    return np.asarray(array).astype(np.float64)


def of_oracle(w: ScaledArray, dtype):
    """The values by the published definitions, rounded to float32 and then to dtype: [E, P N, K]."""
    matrices = []
    for expert in range(w.codes.shape[0]):
        for part in range(w.codes.shape[1]):
            stored = np.asarray(w.codes[expert, part])
            codes = oracle.unpacked(w.format, stored) if FORMATS[w.format].packing == 2 else stored
            scales = {name: np.asarray(scale[expert, part]) for name, scale in w.scales.items()}
            block = 128 if w.format.startswith("fp8_block") else None
            matrices.append(oracle.decode(w.format, codes, scales, block))
    values = np.stack(matrices).astype(np.float32).astype(dtype)
    return values.reshape(w.codes.shape[0], -1, values.shape[-1])


@every_format
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("parts", "k", "n"), [(1, 128, 40), (2, 256, 24), (1, 1152, 3)], ids=str)
def test_decoded_weights(rng, name, dtype, parts, k, n):
    """To the bit, for sizes that no block divides, and in parts."""
    values = rng.normal(size=(3, k, parts * n)) * np.exp(rng.normal(size=(3, 1, parts * n)))
    w = encode(jnp.asarray(values, jnp.float32), name, parts=parts)
    expected = of_oracle(w, jnp.dtype(dtype))
    np.testing.assert_array_equal(decoding.decoded(w, 0, k, dtype), expected)
    np.testing.assert_array_equal(decoding.decoded(w, 32, 96, dtype), expected[:, :, 32:128])
    np.testing.assert_array_equal(np.asarray(w.decode(dtype)).swapaxes(1, 2), expected)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_every_scale(rng, name):
    """All bytes, among them NaN and the least and largest powers of two."""
    group = 32 if name == "mxfp4" else 16
    codes = rng.integers(256, size=(1, 1, 256, group), dtype=np.uint8)
    scales = {"block": np.repeat(np.arange(256, dtype=np.uint8)[None, None, :, None], 2, axis=-1)}
    if name == "nvfp4":
        scales["tensor"] = np.full((1, 1, 1, 1), 0.37, np.float32)
    w = ScaledArray(jnp.asarray(codes), {key: jnp.asarray(scale) for key, scale in scales.items()}, name)
    with np.errstate(over="ignore"):
        expected = of_oracle(w, jnp.bfloat16)
    np.testing.assert_array_equal(float64(decoding.decoded(w, 0, 2 * group, "bfloat16")), float64(expected))


def asked(name, sizes, k, n):
    lhs = Operand("bfloat16", "gathered")
    return problem("dgrad", 24, (len(sizes), k, n), "bfloat16", lhs=lhs, rhs=Operand(name), device=WHOLE_H200)


@every_format
@pytest.mark.parametrize(("most", "widths"), [(2**30, [384]), (50_000, [256, 128])], ids=["whole", "in parts"])
@pytest.mark.parametrize("parts", [1, 2])
def test_products(rng, name, parts, most, widths, monkeypatch):
    """The product of each part by a kernel for dense weights, for which the reference stands in."""
    monkeypatch.setattr(decoding, "MOST_BYTES", parts * most)
    sizes, k, n = np.asarray([5, 0, 9, 8]), 384, 32
    w = encode(jnp.asarray(rng.normal(size=(4, k, parts * n)), jnp.float32), name, parts=parts)
    table = jnp.asarray(rng.normal(size=(7, parts * n)), jnp.bfloat16)
    rows = GatheredRows(table, jnp.asarray(rng.integers(7, size=24), jnp.int32))
    asked_for, multiplied = asked(name, sizes, k, parts * n), []

    def multiply(dense, operands):
        assert (dense.contraction, dense.k, dense.rhs.format) == ("fwd", parts * n, "bfloat16")
        assert operands.rhs.shape == (4, dense.k, dense.n)
        assert dense.lhs.layout == ("dense" if multiplied else "gathered")
        multiplied.append(dense.n)
        lhs = gathered(operands.lhs)
        out = reference.grouped_matmul(float64(lhs), float64(operands.rhs), sizes)
        return Outputs(jnp.asarray(out, jnp.bfloat16), lhs=lhs)

    given = Operands(rows, w, jnp.asarray(sizes))
    out = decoding.run(asked_for, given, multiply).out
    assert multiplied == widths
    expected = reference.grouped_matmul(float64(gathered(rows)), of_oracle(w, np.float64), sizes)
    assert_close(float64(out), expected, "bfloat16")


def with_scale(w: ScaledArray, name: str, dtype: str) -> ScaledArray:
    return dataclasses.replace(w, scales=w.scales | {name: w.scales[name].astype(dtype)})


def test_scales_in_other_dtypes(rng):
    """32-bit scales are widened before the kernel reads them, and others are refused."""
    sizes, rows = np.asarray([8, 16]), jnp.asarray(rng.normal(size=(24, 32)), jnp.bfloat16)
    values = jnp.asarray(rng.normal(size=(2, 256, 32)), jnp.float32)

    def run(w):
        decoded = []

        def multiply(dense, operands):
            decoded.append(operands.rhs)
            return Outputs(jnp.zeros((24, dense.n), jnp.bfloat16), lhs=operands.lhs)

        decoding.run(asked(w.format, sizes, 256, 32), Operands(rows, w, jnp.asarray(sizes)), multiply)
        return decoded[0]

    w = with_scale(encode(values, "fp8_block"), "block", "bfloat16")
    np.testing.assert_array_equal(run(w), np.asarray(w.decode("bfloat16")).swapaxes(1, 2))
    with pytest.raises(InputError, match="the scales 'block' of w are float32, not bfloat16: convert them"):
        run(with_scale(encode(values, "int4_32"), "block", "float32"))
