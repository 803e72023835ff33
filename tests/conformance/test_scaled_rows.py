"""Products of codes with codes pass the suite, gather codes, and refuse unsupported problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import CutlassBackend, CutlassTile, PallasBackend, Precision
from jax_latent_moe.errors import ConfigError, InputError, UnsupportedError
from jax_latent_moe.formats import ScaledRows, encode, encode_rows
from jax_latent_moe.grouped_matmul import (
    GatheredRows,
    explain,
    grouped_matmul,
    grouped_wgrad,
    operand_of,
    problem,
    select,
)
from jax_latent_moe.grouped_matmul.operands import gathered
from tests.conformance import suite
from tests.conformance.oracle import oracle_matmul, random_group_sizes
from tests.conformance.rows import KERNELS_OF_CODES, SCALED_ROWS, param
from tests.conformance.suite import CHECKS
from tests.kernels import CPU, H200
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row", SCALED_ROWS, ids=str)
def test_the_suite(rng, row, check):
    check(row, rng)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row", [param(row, few=False) for row in KERNELS_OF_CODES])
def test_the_suite_of_kernels(rng, row, check):
    check(row, rng)


def drawn(rng, dtype="bfloat16"):
    table, w = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 130), (3, 130, 9)))
    return jnp.asarray(table, dtype), jnp.asarray(w), rng.integers(6, size=20).astype(np.int32), np.array([11, 0, 7])


def test_codes_are_gathered(rng):
    """A token is encoded once; an id outside of the table takes the nearest row."""
    table, w, row_ids, sizes = drawn(rng)
    row_ids[:2] = -3, 9
    codes, weight = encode_rows(table, "fp8_block"), encode(w, "fp8_block")
    out = jax.jit(grouped_matmul)(GatheredRows(codes, row_ids), weight, sizes)
    values = np.asarray(codes.decode("float32"))[np.clip(row_ids, 0, 5)]
    assert_close(out, oracle_matmul(values, np.asarray(weight.decode("float32")), sizes), "bfloat16")
    assert out.dtype == jnp.bfloat16
    assert operand_of(GatheredRows(codes, jnp.asarray(row_ids))).format == "fp8_block"
    assert operand_of(table).format == "bfloat16"  # JAX's arrays have a `format` of their own


@pytest.mark.parametrize("width", [132, 130])
def test_words_of_codes_are_gathered_on_a_gpu(rng, width):
    codes = encode_rows(jnp.asarray(rng.normal(size=(6, width)), jnp.bfloat16), "fp8_block")
    row_ids = jnp.asarray([-3, 9, 4, 4, 0], jnp.int32)
    expected = gathered(GatheredRows(codes, row_ids), CPU)
    found = jax.jit(lambda rows: gathered(rows, H200))(GatheredRows(codes, row_ids))
    np.testing.assert_array_equal(expected.codes, np.asarray(codes.codes)[[0, 5, 4, 4, 0]])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_codes_get_no_gradient(rng):
    table, w, _, _ = drawn(rng, "float32")

    def loss(table, scale):
        out = grouped_matmul(encode_rows(table, "fp8_block"), encode(w, "fp8_block"), np.array([2, 0, 4]))
        return jnp.sum(out * scale)

    dtable, dscale = jax.grad(loss, (0, 1))(table, 2.0)
    assert not np.asarray(dtable).any()
    assert dscale != 0


def test_errors_say_what_to_do(rng):
    table, w, row_ids, sizes = drawn(rng)
    codes = encode_rows(table, "fp8_block")
    with pytest.raises(InputError, match="rows in fp8_block need a weight in codes, not one of dtype float32"):
        grouped_matmul(codes, w, np.array([2, 0, 4]))
    with pytest.raises(InputError, match="has no weights: multiply the rows before they are encoded"):
        grouped_matmul(GatheredRows(codes, row_ids, np.ones(20, np.float32)), encode(w, "fp8_block"), sizes)
    with pytest.raises(ConfigError, match="'mxfp4' is for weights only: rows can be in fp8_block, fp8_block_pow2"):
        encode_rows(table, "mxfp4")
    with pytest.raises(ConfigError, match="'fp9' is unknown: rows can be in fp8_block"):
        encode_rows(table, "fp9")
    for bad in (jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), jnp.zeros((2, 3), jnp.float8_e4m3fn)):
        with pytest.raises(InputError, match=r"must be floating with at least 16 bits, \[rows, features\]"):
            encode_rows(bad, "fp8_block")
    with pytest.raises(ConfigError, match=r"\['fp8_block'\] is unknown"):
        encode_rows(table, ["fp8_block"])
    with pytest.raises(ConfigError, match=r"\['fp8_block'\] is unknown"):
        encode(w, ["fp8_block"])
    for again in (lambda: encode_rows(codes, "fp8_block"), lambda: encode(encode(w, "int8"), "fp8_block")):
        with pytest.raises(InputError, match=r"are in (fp8_block|int8) already"):
            again()
    for wrong in ((encode(w, "fp8_block"), encode(w, "fp8_block")), (table, codes)):
        with pytest.raises(InputError, match="rows may be ScaledRows and w a ScaledArray"):
            grouped_matmul(*wrong, sizes)
    with pytest.raises(InputError, match="must be arrays, not codes"):
        grouped_wgrad(codes, codes, sizes)
    with pytest.raises(InputError, match="must be a jax\\.lax\\.Precision or None"):
        grouped_matmul(table, w, sizes, precision=Precision("fp8_block"))


@pytest.mark.parametrize(
    ("contraction", "shape", "dtype", "reason"),
    [
        ("dgrad", (4, 128, 64), "bfloat16", "computes only fwd"),
        ("fwd", (4, 128, 64), "float32", 'stores bfloat16 or float16, not float32: set dtype="bfloat16"'),
        ("fwd", (4, 100, 64), "bfloat16", "k=100 of FP8 codes is not a positive multiple of 128"),
    ],
)
def test_the_kernel_refuses(contraction, shape, dtype, reason):
    operand = operand_of(ScaledRows(None, None, "fp8_block", jnp.dtype(dtype)))
    asked = problem(contraction, 100, shape, dtype, lhs=operand, rhs=operand, device=H200)
    with pytest.raises(UnsupportedError, match=reason):
        select(asked, PallasBackend())
    assert "XlaBackend" in explain(asked)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_compiled_kernel_stores_bfloat16(dtype):
    """The sentence says how a layer in another dtype gets its FP8 products."""
    operand = operand_of(ScaledRows(None, None, "fp8_block", jnp.dtype(dtype)))
    asked = problem("fwd", 100, (4, 128, 64), dtype, lhs=operand, rhs=operand, device=H200)
    with pytest.raises(UnsupportedError, match=f'stores bfloat16, not {dtype}: set dtype="bfloat16"'):
        select(asked, CutlassBackend())
    right = problem("fwd", 100, (4, 128, 64), "bfloat16", lhs=operand, rhs=operand, device=H200)
    assert isinstance(select(right, CutlassBackend()).tile, CutlassTile)


def test_the_kernel_runs_what_it_has():
    operand = operand_of(ScaledRows(None, None, "fp8_block", jnp.dtype("bfloat16")))
    asked = problem("fwd", 180224, (512, 1024, 2688), "bfloat16", lhs=operand, rhs=operand, device=H200)
    assert "PallasFp8Tile(rows=128, columns=192" in explain(asked, PallasBackend())
    few = problem("fwd", 22, (512, 1024, 2688), "bfloat16", lhs=operand, rhs=operand, device=H200)
    assert "PallasFp8Tile(rows=64, columns=128" in explain(few, PallasBackend())


def test_random_sizes_of_the_interpreted_kernel(rng):
    """A few cells of the suite without a GPU, in one compilation each."""
    row = KERNELS_OF_CODES[0]
    for k, rows in ((2, 24), (9, 70)):
        left, w, dout = suite.draw(row, rng, rows=rows, k=k, n=8)
        left[rows - 3 :] = np.nan
        suite.check(row, left, w, random_group_sizes(rng, suite.EXPERTS, rows - 3), dout)


def test_float64_rows(rng):
    table, w, _, _ = drawn(rng)
    with jax.enable_x64(True):
        codes, weight = encode_rows(jnp.asarray(table, "float64"), "fp8_block"), encode(w, "fp8_block")
        out = grouped_matmul(codes, weight, np.array([2, 0, 4]))
        values, weights = np.asarray(codes.decode("float64")), np.asarray(weight.decode("float64"))
    assert_close(out, oracle_matmul(values, weights, [2, 0, 4]), "float64")
