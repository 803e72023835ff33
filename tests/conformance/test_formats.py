"""Every weight format of the package passes the suite on the portable path; other backends refuse it."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import native
from jax_latent_moe.config import CutlassBackend, PallasBackend
from jax_latent_moe.device import Device
from jax_latent_moe.errors import ConfigError, InputError, UnsupportedError
from jax_latent_moe.formats import FORMATS, encode
from jax_latent_moe.grouped_matmul import Operand, explain, grouped_matmul, problem, select
from tests.conformance import suite
from tests.conformance.oracle import compiled, oracle_run, random_group_sizes
from tests.conformance.rows import EVERY_CELL, FORMAT_ROWS, WIDENING_KERNELS, param
from tests.conformance.suite import CHECKS
from tests.programs import floating_arrays
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")
every_format = pytest.mark.parametrize("row", FORMAT_ROWS, ids=str)
H200 = Device("gpu", "NVIDIA H200", 132)


def test_every_format_has_a_row():
    assert {row.weight_format for row in FORMAT_ROWS} == set(FORMATS)


@pytest.mark.skipif(not EVERY_CELL, reason="JAX_LATENT_MOE_EVERY_CELL=1 runs the whole suite for every format")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@every_format
def test_the_whole_suite(rng, row, check):
    check(row, rng)


@every_format
def test_a_part_of_the_suite(rng, row):
    """The checks that share one compilation, of fwd and dgrad."""
    suite.check_padding_rows_leak_nowhere(row, rng)
    suite.check_all_rows_on_one_expert(row, rng)


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # the interpreter multiplies padding rows that hold infinity
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row", [param(row, few=False) for row in WIDENING_KERNELS])
def test_the_suite_of_kernels(rng, row, check):
    check(row, rng)


@pytest.mark.parametrize("row", [row for row in FORMAT_ROWS if row.name in ("fp8_block", "nvfp4")], ids=str)
def test_vmap_export_and_transpose(rng, row):
    """A leading axis of layers on codes and scales, a program for another process, and a transposed weight."""
    rows, weight, dout = suite.draw(row, rng)
    sizes = np.full(suite.EXPERTS, suite.ROWS // suite.EXPERTS, np.int32)
    expected = oracle_run(rows, row.values(weight), sizes, dout)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), weight)
    out = jax.jit(jax.vmap(compiled(row), in_axes=(None, 0, None, None)))(rows, layers, sizes, dout)
    exported = jax.export.export(compiled(row), disabled_checks=native.export_checks())(rows, weight, sizes, dout)
    for name, value in exported.call(rows, weight, sizes, dout).items():
        assert_close(value, expected[name], row.dtype, name)
        assert_close(out[name][0], expected[name], row.dtype, name)
    rows, weight, dout = suite.draw(row, rng, "bfloat16", transpose_w=True)
    sizes = random_group_sizes(rng, suite.EXPERTS, suite.ROWS - 5)
    suite.check(row, rows, weight, sizes, dout, "bfloat16", transpose_w=True)


@every_format
def test_no_dense_weight_is_made(row):
    """The portable path decodes the weights of a few experts at a time, in both directions."""
    experts, k, n = 4096, row.size(5), row.size(7)
    weight = jax.eval_shape(partial(encode, name=row.name), jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16))
    rows, sizes = jax.ShapeDtypeStruct((24, k), jnp.bfloat16), jax.ShapeDtypeStruct((experts,), jnp.int32)

    def products(rows, weight, sizes):
        out, pullback = jax.vjp(lambda rows: grouped_matmul(rows, weight, sizes, backend=row.backend), rows)
        return pullback(out)

    largest = max(map(math.prod, floating_arrays(jax.make_jaxpr(products)(rows, weight, sizes))))
    assert largest < k * n * experts // 4


@every_format
def test_compiled_kernels_refuse_its_gradient_of_few_rows_and_auto_takes_a_kernel_that_widens_it(row):
    asked = problem("fwd", 24, (8, 128, 128), "bfloat16", rhs=Operand(row.name), device=H200)
    with pytest.raises(UnsupportedError, match="24 rows are fewer than 4 for each of 8 experts: XlaBackend"):
        select(dataclasses.replace(asked, contraction="dgrad"), CutlassBackend())
    text = explain(asked, "auto")
    assert f"of bfloat16 and {row.name} to bfloat16" in text
    assert f"{PallasBackend()!r} runs it" in text


@pytest.mark.parametrize("shape", [(0, 256, 128), (2, 0, 128), (2, 256, 0), (0, 0, 0), (256, 0)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_without_elements(name, parts, shape):
    """They have the blocks of the format, so meshes and checkpoints treat them as others."""
    weight = encode(np.zeros(shape, np.float32), name, parts=parts)
    assert weight.shape == weight.decode(jnp.float32).shape == shape
    k_blocks, n_blocks = FORMATS[name].blocks(shape[-2], shape[-1] // parts)
    assert (*shape[:-2], parts, n_blocks, k_blocks) in {scale.shape for scale in jax.tree.leaves(weight.scales)}


@pytest.mark.parametrize(
    ("shape", "parts", "error", "message"),
    [
        ((8,), 1, InputError, r"values of shape \(8,\) must be \[..., K, parts \* N\]"),
        ((8, 8), 0, ConfigError, "parts=0 must be an integer of at least 1"),
        ((8, 8), 2.0, ConfigError, "parts=2.0 must be an integer"),
        ((8, 9), 2, InputError, "9 columns are not 2 matrices"),
    ],
)
def test_what_is_no_weight_is_refused(shape, parts, error, message):
    with pytest.raises(error, match=message):
        encode(np.zeros(shape, np.float32), "int8", parts=parts)


@pytest.mark.parametrize(
    ("name", "k", "n", "multiple"), [("mxfp4", 48, 4, 32), ("nvfp4", 24, 4, 16), ("int4_128_zero", 192, 3, 128)]
)
def test_a_width_that_blocks_do_not_divide_is_refused(name, k, n, multiple):
    with pytest.raises(ConfigError, match=f"K={k} of a weight of {k} x {n} is not a multiple of {multiple}, .*{name}"):
        encode(np.ones((2, k, n), np.float32), name)
