"""The compiled kernels on a Hopper GPU: with `CUDA_LAUNCH_BLOCKING=1` an error points at its call."""

import ctypes
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import CutlassBackend
from jax_latent_moe.grouped_matmul import (
    Epilogue,
    GatheredRows,
    LastColumns,
    grouped_matmul,
    grouped_wgrad,
    problem,
    reference,
)
from jax_latent_moe.grouped_matmul.cutlass_sm90 import backend as cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.tiles import tiles as compiled_tiles
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS
from jax_latent_moe.native import library, library_path
from tests.gpu.grouped import (
    check,
    check_fused,
    check_weights_beyond_two_to_the_31_elements,
    float64,
    jitted,
    needs_hopper,
    product,
    same,
)
from tests.kernels import RESIDUAL, epilogue_of, layer_of
from tests.oracle.fused import activation_of_rows, matmul_activation_grad
from tests.tolerances import assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]
BACKEND = CutlassBackend()
FUSING = Cutlass(CutlassBackend(fuse="always"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("features", [(256, 320), (72, 136), (1000, 2696)])
def test_random_groups_with_empty_experts(rng, dtype, features):
    for total in (1517, 900, 1):
        sizes = rng.multinomial(total, rng.dirichlet(np.full(16, 0.3)))
        check(BACKEND, rng, dtype, sizes, 1517, *features)


def test_one_expert_has_all_and_none_has_any(rng):
    for sizes in (np.eye(16, dtype=int)[11] * 1517, np.zeros(16, int)):
        check(BACKEND, rng, "bfloat16", sizes, 1517, 256, 320)


@pytest.mark.parametrize("num_rows", [1, 8, 22])
def test_few_rows(rng, num_rows):
    check(BACKEND, rng, "bfloat16", rng.multinomial(num_rows, np.full(40, 1 / 40)), num_rows, 128, 192)


def test_more_tiles_than_sms(rng):
    check(BACKEND, rng, "bfloat16", rng.multinomial(2500, np.full(40, 1 / 40)), 3000, 264, 1032)


# The heuristic gives relu2 tiles of 192 columns for the first width, and of 128 for the second.
@pytest.mark.parametrize("width", [1040, 208])
@pytest.mark.parametrize(("num_rows", "owned"), [(3000, 2500), (517, 517), (1, 1)])
def test_rows_that_the_kernel_gathers_are_those_gathered_before(rng, num_rows, owned, width):
    """To the bit, by every tile, ids outside of the table included; and they are right."""
    experts, in_features, tokens = 40, 264, 90
    sizes = rng.multinomial(owned, rng.dirichlet(np.full(experts, 0.5)))
    table, w = rng.normal(size=(tokens, in_features)), rng.normal(size=(experts, in_features, width)) / 16
    ids = rng.integers(-3, tokens + 3, num_rows)
    rows = GatheredRows(jnp.asarray(table, jnp.bfloat16), jnp.asarray(ids, jnp.int32))
    w, groups = jnp.asarray(w, jnp.bfloat16), jnp.asarray(sizes, jnp.int32)
    expected = reference.grouped_matmul(float64(rows.table)[np.clip(ids, 0, tokens - 1)], float64(w), sizes)
    for tile in compiled_tiles(problem("fwd", num_rows, w.shape, "bfloat16")):
        multiply = jax.jit(functools.partial(grouped_matmul, backend=CutlassBackend(matmul_tile=tile)))
        out = multiply(rows, w, groups)
        assert_close(float64(out), expected, "bfloat16", repr(tile))
        assert (np.asarray(out) == np.asarray(multiply(gathered(rows), w, groups))).all()
    w_out, kept = w.reshape(experts, width, in_features), jnp.asarray(rng.random((num_rows, 2 * width)), jnp.bfloat16)
    weighted = rows._replace(weights=jnp.asarray(rng.normal(size=num_rows), jnp.float32))
    for name in ("relu2", "swiglu"):
        fused, columns = epilogue_of(name), width * (2 if name == "swiglu" else 1)
        same(*(jitted(FUSING, "fwd", lhs, w, groups, epilogue=fused) for lhs in (rows, gathered(rows))))
        for named in (rows, weighted):
            arguments = w_out, groups, kept[:, :columns], jnp.ones(num_rows)
            same(*(jitted(FUSING, "dgrad", lhs, *arguments, epilogue=fused) for lhs in (named, gathered(named))))


@pytest.mark.parametrize("owned", [2500, 3000])
def test_weight_gradients_of_rows_that_the_kernel_gathers(rng, monkeypatch, owned):
    """To the bit, by every tile, of either operand, weighted or not; and they are right."""
    monkeypatch.setattr(cutlass, "FEW_PRODUCTS", 0)
    num_rows, experts, (k, n), tokens = 3000, 40, (264, 1032), 90
    groups = jnp.asarray(rng.multinomial(owned, rng.dirichlet(np.full(experts, 0.5))), jnp.int32)
    weights = jnp.asarray(rng.normal(size=num_rows), jnp.float32)
    ids = jnp.asarray(rng.integers(-3, tokens + 3, num_rows), jnp.int32)
    tables = [jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16) for width in (k, n)]
    rows, dout = (jnp.asarray(rng.normal(size=(num_rows, width)), jnp.bfloat16) for width in (k, n))
    for tile in compiled_tiles(problem("wgrad", num_rows, (experts, k, n), "bfloat16")):
        backend = Cutlass(CutlassBackend(wgrad_tile=tile))
        for weight in (None, weights):
            left, right = (GatheredRows(table, ids, weight) for table in tables)
            for operands in ((left, dout), (rows, right), (left, right)):
                there = tuple(gathered(operand) for operand in operands)
                found = jitted(backend, "wgrad", *operands, groups)
                same(found, jitted(backend, "wgrad", *there, groups))
                same((found["lhs"], found["rhs"]), there)
                expected = reference.grouped_wgrad(*map(float64, there), np.asarray(groups))
                assert_close(float64(found["out"]), expected, "bfloat16", repr(tile))


def test_more_tiles_than_a_cluster_is_told_of_at_a_time(rng):
    """A weight gradient of 28672 tiles, of a few steps, one or none: each warp works on the right tile."""
    num_rows, experts, widths = 180224, 512, (1024, 2688)
    sizes = rng.multinomial(num_rows - 9, rng.dirichlet(np.full(experts, 2.0)))
    sizes[rng.integers(0, experts, 100)] = 0
    sizes[rng.integers(0, experts, 100)] = 1
    groups, starts = jnp.asarray(sizes, jnp.int32), np.cumsum(sizes) - sizes
    rows, dout = (jax.random.normal(jax.random.key(width), (num_rows, width), jnp.bfloat16) for width in widths)
    some = np.unique([0, experts - 1, sizes.argmin(), sizes.argmax(), np.flatnonzero(sizes == 1)[0], 100, 200, 300])
    left, right = np.asarray(rows), np.asarray(dout)
    own = [slice(starts[expert], starts[expert] + sizes[expert]) for expert in some]
    expected = np.stack([np.float64(left[rows]).T @ np.float64(right[rows]) for rows in own])
    for tile in compiled_tiles(problem("wgrad", num_rows, (experts, *widths), "bfloat16")):
        wgrad = jax.jit(functools.partial(grouped_wgrad, backend=CutlassBackend(wgrad_tile=tile)))
        first = wgrad(rows, dout, groups)
        for _ in range(5):
            assert jnp.array_equal(first, wgrad(rows, dout, groups))
        assert_close(float64(first[some]), expected, "bfloat16", repr(tile))


def test_weights_beyond_two_to_the_31_elements(rng):
    check_weights_beyond_two_to_the_31_elements(BACKEND, rng)


@pytest.mark.parametrize("contraction", ["fwd", "dgrad", "wgrad"])
def test_every_compiled_tile(rng, contraction):
    sizes = rng.multinomial(2500, rng.dirichlet(np.full(40, 0.5)))
    w_shape = 40, 264, 1032
    for tile in compiled_tiles(problem(contraction, 3000, w_shape, "bfloat16")):
        kind = "wgrad_tile" if contraction == "wgrad" else "matmul_tile"
        check(dataclasses.replace(BACKEND, **{kind: tile}), rng, "bfloat16", sizes, 3000, *w_shape[1:])


def test_the_halves_of_the_l2_cache_are_told_apart(rng):
    check(BACKEND, rng, "bfloat16", np.asarray([3, 5]), 8, 64, 64)
    bits = (ctypes.c_uint32 * 8)()
    ctypes.CDLL(str(library_path())).latent_moe_l2_slices(0, bits)
    ones = sum(bin(word).count("1") for word in bits)
    assert 0.4 < ones / jax.devices()[0].core_count < 0.6


def test_many_calls_in_one_program(rng):
    """Enough of them that XLA may put them into one CUDA graph."""
    sizes = rng.multinomial(2500, np.full(40, 1 / 40))
    shapes = (3000, 264), (40, 264, 1032), (3000, 1032)
    rows, w, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    @jax.jit
    def run(rows, w, dout, sizes):
        return [
            (
                grouped_matmul(rows * i, w, sizes, backend=BACKEND),
                grouped_matmul(dout * i, w, sizes, transpose_w=True, backend=BACKEND),
                grouped_wgrad(rows * i, dout, sizes, backend=BACKEND),
            )
            for i in (1, 2, 4, 8, 16, 32)
        ]

    first = run(rows, w, dout, jnp.asarray(sizes, jnp.int32))
    again = run(rows, w, dout, jnp.asarray(sizes, jnp.int32))
    out = reference.grouped_matmul(float64(rows), float64(w), sizes)
    dw = reference.grouped_wgrad(float64(rows), float64(dout), sizes)
    for i, (one, two) in enumerate(zip(first, again, strict=True)):
        assert_close(float64(one[0]) / 2**i, out, "bfloat16")
        assert_close(float64(one[2]) / 2**i, dw, "bfloat16")
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", KERNEL_ACTIVATIONS)
def test_fused_activations(rng, name):
    fused = FUSING, rng, name, RESIDUAL[name], "bfloat16"
    check_fused(*fused, np.asarray([0, 300, 1, 77, 200]), 700, 72, 200)
    check_fused(*fused, rng.multinomial(900, rng.dirichlet(np.full(16, 0.3))), 1517, 128, 704)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu_tanh"])
@pytest.mark.parametrize("gate", [0.0, 1e-30, -1e4, -30.0, 1e4])
def test_gates_of_which_hidden_rows_tell_nothing(rng, name, gate):
    """Hidden rows are near 0 for every up half; the gradient of both halves is still right."""
    config = layer_of(name)
    fused = Epilogue(config.bound_activation, "gate_hidden")
    sizes, (num_rows, width, hidden_size) = np.asarray([70, 0, 30]), (100, 64, 72)
    rows = np.abs(rng.normal(size=(num_rows, width))) + 0.1
    w_in = rng.normal(size=(3, width, 2 * hidden_size)) / 8
    rows[:, 0], w_in[:, :, :hidden_size], w_in[:, 0, :hidden_size] = 1, 0, gate
    dout, w_out = rng.normal(size=(num_rows, width)), rng.normal(size=(3, hidden_size, width)) / 8
    rows, w_in, dout, w_out = (jnp.asarray(x, jnp.bfloat16) for x in (rows, w_in, dout, w_out))
    groups, ones = jnp.asarray(sizes, jnp.int32), jnp.ones(num_rows)
    kept = product(FUSING, "fwd", rows, w_in, groups, epilogue=fused).residual
    hidden = kept[:, hidden_size:]
    dpre = product(FUSING, "dgrad", dout, w_out, groups, kept + 0, ones, epilogue=fused).out
    pre = reference.grouped_matmul(float64(rows), float64(w_in), sizes)
    expected, *_ = matmul_activation_grad(config, float64(dout), float64(w_out), sizes, pre, np.ones(num_rows), "pre")
    gradients = np.split(float64(dpre), 2, axis=1)
    # 1 is added, because the relative error of values near 0 means nothing.
    assert_close(1 + float64(hidden), 1 + activation_of_rows(config, pre)[0], "bfloat16", "hidden")
    for half, value, ref in zip(("gate", "other half"), gradients, np.split(expected, 2, axis=1), strict=True):
        assert_close(1 + value, 1 + ref, "bfloat16", f"gradient of the {half}")


@pytest.mark.parametrize("offset", [96, 72, 200])
def test_columns_of_wider_rows_are_read_where_they_stand(rng, offset):
    """Products of rows and weight gradients, to the bit those of the columns cut out beforehand, by every tile."""
    sizes, num_rows, width = np.asarray([130, 0, 300, 1]), 450, 136
    matrix = jnp.asarray(rng.normal(size=(num_rows, offset + width)), jnp.bfloat16).at[:, :offset].set(jnp.nan)
    rows, groups = LastColumns(matrix, width), jnp.asarray(sizes, jnp.int32)
    w, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, width, 264), (num_rows, 264)))
    for tile in compiled_tiles(problem("fwd", num_rows, w.shape, "bfloat16")):
        backend = Cutlass(CutlassBackend(matmul_tile=tile))
        found = product(backend, "fwd", rows, w, groups).out
        same(found, product(backend, "fwd", gathered(rows), w, groups).out)
        assert_close(float64(found), reference.grouped_matmul(float64(gathered(rows)), float64(w), sizes), "bfloat16")
    for tile in compiled_tiles(problem("wgrad", num_rows, w.shape, "bfloat16")):
        backend = Cutlass(CutlassBackend(wgrad_tile=tile))
        found = product(backend, "wgrad", rows, dout, groups).out
        same(found, product(backend, "wgrad", gathered(rows), dout, groups).out)
        assert_close(float64(found), reference.grouped_wgrad(float64(gathered(rows)), float64(dout), sizes), "bfloat16")
