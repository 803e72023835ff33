"""FP8 products on a Hopper GPU: plain, and with an activation or relu2's gradient that the same kernel encodes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import CutlassBackend
from jax_latent_moe.formats import ScaledRows, encode, encode_rows
from jax_latent_moe.grouped_matmul import Epilogue, Operands, operand_of, problem, reference
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.native import library
from jax_latent_moe.row_encoders import GradientEncoder, RowEncoder
from tests.gpu.grouped import GROUPS, NUM_ROWS, float64, needs_hopper, same
from tests.kernels import layer_of
from tests.oracle.fused import activation_of_rows
from tests.tolerances import ROUNDOFF, assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]

BACKEND = Cutlass(CutlassBackend(fuse="always"))
GATED = ("swiglu", "geglu", "geglu_tanh", "situ_glu")
FORMATS = ("fp8_block", "fp8_block_pow2")
# K and N that 128 does not divide, or divides; K of one step, of fewer steps than stages, and of more.
FEATURES = [(1024, 384), (208, 272), (64, 16), (2688, 1024), (528, 144)]
of_all_features = pytest.mark.parametrize("features", FEATURES, ids=str)


def drawn(rng, sizes, k, n, parts=1, num_rows=NUM_ROWS):
    """Operands in codes, with NaN in padding rows, and their values in float64."""
    rows, w = rng.normal(size=(num_rows, k)), rng.normal(size=(len(sizes), k, parts * n)) / np.sqrt(k)
    rows *= rng.uniform(0.01, 3, size=(num_rows, 1))
    rows[sum(sizes) :] = np.nan
    rows, w = (
        encode_rows(jnp.asarray(rows, jnp.bfloat16), "fp8_block"),
        encode(jnp.asarray(w), "fp8_block", parts=parts),
    )
    return rows, w, (float64(rows.decode("float32")), float64(w.decode("float32")))


@functools.cache
def compiled(bound):
    @jax.jit
    def run(rows, w, sizes):
        outputs = bound(Operands(rows, w, sizes))
        return outputs.out, outputs.residual

    return run


def runs(rows, w, sizes, epilogue=None, *, both_orders=False):
    """(tile, out, residual) of each compiled tile, run twice with equal bits."""
    lhs, rhs = operand_of(rows), operand_of(w)
    asked = problem("fwd", rows.shape[0], w.shape, "bfloat16", lhs=lhs, rhs=rhs, epilogue=epilogue)
    assert BACKEND.supports(asked) is None
    sizes = jnp.asarray(sizes, jnp.int32)
    for tile in BACKEND.tiles(asked):
        if both_orders or not tile.rows_first:
            run = compiled(dataclasses.replace(bind(BACKEND, asked), tile=tile))
            found = run(rows, w, sizes)
            same(found, run(rows, w, sizes))
            yield tile, *found


def same_codes(found, rows, label):
    """To the bit, those of the compiled encoder of rows."""
    expected = jax.jit(RowEncoder(found.format, None))(rows)
    np.testing.assert_array_equal(found.codes, expected.codes, err_msg=label)
    np.testing.assert_array_equal(found.scales["block"], expected.scales["block"], err_msg=label)


@of_all_features
def test_every_tile_of_plain_products(rng, features):
    for groups, sizes in GROUPS.items():
        rows, w, values = drawn(rng, sizes, *features)
        expected = reference.grouped_matmul(*values, sizes)
        for tile, out, _ in runs(rows, w, sizes):
            assert_close(float64(out), expected, "bfloat16", f"{groups} {tile}")
            assert not out[sum(sizes) :].any()


@pytest.mark.parametrize("format", FORMATS)
@of_all_features
def test_codes_of_relu2_are_those_of_an_encoder_behind_it(rng, features, format):
    """Padding rows too. The hidden rows are those of the product without an encoder."""
    config = layer_of("relu2")
    plain = Epilogue(config.bound_activation, "hidden")
    keeps, alone = (dataclasses.replace(plain, residual=residual, encodes=format) for residual in ("hidden", None))
    for groups, sizes in GROUPS.items():
        rows, w, values = drawn(rng, sizes, *features)
        pre = np.asarray(reference.grouped_matmul(*values, sizes), jnp.bfloat16)
        expected = activation_of_rows(config, np.float64(pre))[0]
        hidden = [hidden for _, hidden, _ in runs(rows, w, sizes, plain)]
        for other in hidden:
            assert_close(float64(other), expected, "bfloat16", groups)
            same(other, hidden[0])
        for tile, out, kept in runs(rows, w, sizes, keeps):
            assert isinstance(out, ScaledRows)
            same(kept, hidden[0])
            same_codes(out, hidden[0], f"{groups} {tile}")
        for tile, out, kept in runs(rows, w, sizes, alone):
            assert kept is None
            same_codes(out, hidden[0], f"{groups} {tile}")


@pytest.mark.parametrize("name", GATED)
@of_all_features
def test_codes_of_gated_activations(rng, name, features):
    """Hidden rows of the pre-activation that is kept, within the roundings to bfloat16 and to a code."""
    config = layer_of(name)
    for format in FORMATS:
        epilogue = Epilogue(config.bound_activation, "pre", encodes=format)
        for groups, sizes in GROUPS.items():
            rows, w, values = drawn(rng, sizes, *features, parts=2)
            without = runs(rows, w, sizes, dataclasses.replace(epilogue, residual=None))
            for (tile, out, pre), (_, alone, _) in zip(runs(rows, w, sizes, epilogue), without, strict=True):
                same(alone, out)
                assert_close(float64(pre), reference.grouped_matmul(*values, sizes), "bfloat16", f"{groups} {tile}")
                hidden = activation_of_rows(config, float64(pre))[0]
                scales = np.repeat(np.float64(out.scales["block"]), 128, axis=1)[:, : hidden.shape[1]]
                # A code has 3 bits behind its first one, and the least step is 2^-9.
                half_step = np.abs(hidden) * (2.0**-4 + 4 * ROUNDOFF["bfloat16"]) + scales * 2.0**-10
                assert (np.abs(float64(out.decode("float32")) - hidden) <= half_step).all(), f"{groups} {tile}"
                for block in range(0, hidden.shape[1], 128):
                    largest = np.maximum(np.abs(hidden[:, block : block + 128]).max(axis=1), 1e-30) / 448
                    quotient = scales[:, block] / largest
                    assert (quotient > 1 - 2.0**-6).all()
                    assert (quotient < (2 if format == "fp8_block_pow2" else 1) * (1 + 2.0**-6)).all()
                assert not out.codes[sum(sizes) :].any()
                assert not pre[sum(sizes) :].any()


def test_a_row_with_nan_or_infinity_stays_alone(rng):
    sizes = GROUPS["ragged"]
    rows, w, _ = drawn(rng, sizes, 1024, 384)
    pure = np.array(rows.decode("float32"))
    dirty = pure.copy()
    dirty[3, 5], dirty[140, 900] = np.nan, np.inf
    epilogue = Epilogue(layer_of("relu2").bound_activation, None, encodes="fp8_block")
    dirty, pure = (
        [out for _, out, _ in runs(encode_rows(jnp.asarray(values, jnp.bfloat16), "fp8_block"), w, sizes, epilogue)]
        for values in (dirty, pure)
    )
    for found, expected in zip(dirty, pure, strict=True):
        decoded, others = (np.array(out.decode("float32")) for out in (found, expected))
        assert np.isnan(decoded[[3, 140]]).all()
        decoded[[3, 140]] = others[[3, 140]] = 0
        np.testing.assert_array_equal(decoded, others)


def test_many_tiles_of_many_experts(rng):
    """More tiles than SMs, in both orders; every row is stored."""
    sizes = rng.multinomial(40_000, rng.dirichlet(np.full(96, 2.0)))
    rows, w, values = drawn(rng, sizes, 1024, 640, num_rows=40_000)
    pre = np.asarray(reference.grouped_matmul(*values, sizes), jnp.bfloat16)
    hidden = activation_of_rows(layer_of("relu2"), np.float64(pre))[0]
    epilogue = Epilogue(layer_of("relu2").bound_activation, "hidden", encodes="fp8_block")
    for tile, out, kept in runs(rows, w, sizes, epilogue, both_orders=True):
        assert_close(float64(kept), hidden, "bfloat16", str(tile))
        same_codes(out, kept, str(tile))


def drawn_gradient(rng, sizes, n, k, num_rows=NUM_ROWS):
    """Operands of a dgrad: dout and the transposed weight in codes, hidden rows, weights. Padding rows hold NaN."""
    dout, w, values = drawn(rng, sizes, n, k, num_rows=num_rows)
    hidden = np.square(np.maximum(rng.normal(size=(num_rows, k)), 0))
    hidden[1::7] *= 1e30  # some above 2^63
    hidden[2::7] *= 1e-30  # some below 2^-80
    weights = rng.normal(size=num_rows)
    hidden[sum(sizes) :] = weights[sum(sizes) :] = np.nan
    return dout, w, jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(weights, jnp.float32), values


@functools.cache
def compiled_gradient(bound):
    @jax.jit
    def run(*operands):
        outputs = bound(Operands(*operands))
        return outputs.out, outputs.codes, outputs.row_weight_gradients

    return run


def gradients(dout, w, sizes, hidden, weights, format, *, both_orders=False):
    """(tile, dpre, its codes, gradients of the rows' weights) of each compiled tile, run twice with equal bits."""
    experts, n, k = w.shape
    epilogue = Epilogue(layer_of("relu2").bound_activation, "hidden", encodes=format)
    lhs, rhs = operand_of(dout), operand_of(w)
    asked = problem("dgrad", dout.shape[0], (experts, k, n), "bfloat16", lhs=lhs, rhs=rhs, epilogue=epilogue)
    assert BACKEND.supports(asked) is None
    assert len(BACKEND.tiles(asked)) == 4, "two tiles, in two orders"
    operands = dout, w, jnp.asarray(sizes, jnp.int32), hidden, weights
    for tile in BACKEND.tiles(asked):
        if both_orders or not tile.rows_first:
            run = compiled_gradient(dataclasses.replace(bind(BACKEND, asked), tile=tile))
            found = run(*operands)
            same(found, run(*operands))
            yield tile, *found


def separate(dout, w, sizes, hidden, weights, format):
    """The same by the plain product and the kernel behind it, whose padding rows are cleared."""
    _, dhidden, _ = next(runs(dout, w, sizes))
    inside = jnp.arange(dout.shape[0]) < sum(sizes)
    hidden, weights = jnp.where(inside[:, None], hidden, 0), jnp.where(inside, weights, 0)
    return dhidden, jax.jit(GradientEncoder(format, None))(jnp.copy(dhidden), hidden, weights)


@pytest.mark.parametrize("format", FORMATS)
@of_all_features
def test_the_gradient_of_relu2_is_that_of_the_kernel_behind_the_product(rng, features, format):
    """To the bit: the gradient, its codes, and the sums for the rows' weights. Padding rows leak nowhere."""
    for groups, sizes in GROUPS.items():
        dout, w, hidden, weights, values = drawn_gradient(rng, sizes, *features)
        count = int(sum(sizes))
        dhidden, expected = separate(dout, w, sizes, hidden, weights, format)
        assert_close(float64(dhidden), reference.grouped_matmul(*values, sizes), "bfloat16", groups)
        h, d = float64(hidden)[:count], float64(dhidden)[:count]
        exact = 2 * np.sqrt(h) * np.float64(weights)[:count, None] * d
        for tile, dpre, codes, row_weight_gradients in gradients(dout, w, sizes, hidden, weights, format):
            same((dpre, row_weight_gradients), (expected[0], expected[2]))
            same_codes(codes, dpre, f"{groups} {tile}")
            same(codes, expected[1])
            for part in range(3):  # rows of one size each
                rows, label = slice(part, count, 7), f"{groups} {tile} {part}"
                assert_close(float64(dpre)[rows], exact[rows], "bfloat16", label)
                assert_close(float64(row_weight_gradients)[rows], np.sum(d * h, axis=1)[rows], "float32", label)
            assert not dpre[count:].any()
            assert not codes.codes[count:].any()
            assert not row_weight_gradients[count:].any()


def test_a_gradient_with_nan_stays_in_its_row(rng):
    sizes = GROUPS["ragged"]
    dout, w, hidden, weights, _ = drawn_gradient(rng, sizes, 1024, 384)
    dirty = np.array(dout.decode("float32"))
    dirty[3, 5], dirty[140, 900] = np.nan, np.inf
    dirty = encode_rows(jnp.asarray(dirty, jnp.bfloat16), "fp8_block")
    clean = encode_rows(jnp.asarray(dout.decode("float32"), jnp.bfloat16), "fp8_block")
    pairs = zip(*(gradients(rows, w, sizes, hidden, weights, "fp8_block") for rows in (dirty, clean)), strict=True)
    for (_, found, codes, sums), (_, expected, other_codes, other_sums) in pairs:
        assert np.isnan(float64(found)[[3, 140]]).any(axis=1).all()
        assert np.isnan(float64(sums)[[3, 140]]).all()
        for one, other in ((found, expected), (codes.codes, other_codes.codes), (sums, other_sums)):
            one, other = (np.delete(float64(array), [3, 140], axis=0) for array in (one, other))
            np.testing.assert_array_equal(one, other)


def test_gradients_of_many_tiles_of_many_experts(rng):
    """More tiles than SMs, in both orders; every row is stored."""
    sizes = rng.multinomial(40_000, rng.dirichlet(np.full(96, 2.0)))
    dout, w, hidden, weights, _ = drawn_gradient(rng, sizes, 1024, 640, num_rows=40_000)
    _, expected = separate(dout, w, sizes, hidden, weights, "fp8_block")
    for _, *found in gradients(dout, w, sizes, hidden, weights, "fp8_block", both_orders=True):
        same(found, list(expected))
