"""The fused Pallas kernels without a GPU: interpreted against the oracle with race detection, and lowered for CUDA."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_latent_moe.config import PallasBackend, PallasMatmulTile
from jax_latent_moe.grouped_matmul import Epilogue, Operands, explain, fused, problem, reference, select
from jax_latent_moe.grouped_matmul.pallas_sm90.activations import value_and_slopes, value_and_slopes_of_residual
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import FASTER, Pallas
from jax_latent_moe.grouped_matmul.pallas_sm90.fused import matmul_activation
from jax_latent_moe.grouped_matmul.pallas_sm90.fused import matmul_activation_grad as kernel_grad
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS, kernel_activation
from tests.drawn import drawn
from tests.kernels import H200, bound_activation, layer_of
from tests.oracle.fused import activation_of_rows, kept_of, matmul_activation_grad
from tests.tolerances import assert_close

EXPERTS, ROWS, IN, HIDDEN = 5, 100, 128, 192
UNEVEN = [0, 75, 1, 0, 17]
PLAIN_TILES = [
    PallasMatmulTile(rows=64, columns=128, stages=2, store_buffers=2),
    PallasMatmulTile(rows=128, columns=192, stages=2, store_buffers=2, band=2),
    PallasMatmulTile(rows=128, columns=128, stages=2, store_buffers=3, cluster=2),
]
GATED_TILES = [
    PallasMatmulTile(rows=64, columns=128, stages=2, store_buffers=3),
    PallasMatmulTile(rows=128, columns=128, stages=2, store_buffers=3, band=2),
    PallasMatmulTile(rows=128, columns=128, stages=2, store_buffers=3, cluster=2),
]
every_activation = pytest.mark.parametrize("name", KERNEL_ACTIVATIONS)
# An activation with each residual that the kernels make its gradient of.
RESIDUALS = [("relu2", "hidden"), *((name, "pre") for name in KERNEL_ACTIVATIONS)]


def variant(name):
    """The activation as kernels know it, and the config by which the oracle does."""
    config = layer_of(name)
    activation = kernel_activation(config.bound_activation)
    assert activation is not None
    return activation, config


def operands(rng, dtype, config, residual, sizes, num_rows=ROWS):
    """Rows, both weights, output gradients, what is kept and rows' weights; NaN in padding rows."""
    width = HIDDEN * (2 if config.gated else 1)
    shapes = (num_rows, IN), (EXPERTS, IN, width), (num_rows, IN), (EXPERTS, HIDDEN, IN), (num_rows, width)
    rows, w_in, dout, w_out, pre = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    row_weights = rng.random(num_rows, np.float32)
    for x in (rows, dout, pre, row_weights):
        x[sum(sizes) :] = np.nan
    kept = kept_of(config, 2 * pre, residual)
    return *(x.astype(jnp.dtype(dtype)) for x in (rows, w_in / 8, dout, w_out / 8, kept)), row_weights


@pytest.fixture
def interpreter():
    """Parameters of the interpreter; no race may have been found when the test ends."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not gpu_callbacks.get_races().races_found


def check(rng, interpreter, name, sizes, tile, dtype="bfloat16", num_rows=ROWS, residual=None):
    """Both fused products against the oracle; exact zeros in padding rows."""
    activation, config = variant(name)
    residual = residual or ("hidden" if name == "relu2" else "pre")
    rows, w_in, dout, w_out, kept, row_weights = operands(rng, dtype, config, residual, sizes, num_rows)
    settings = dict(activation=activation, tile=tile, num_sms=2 * tile.cluster, interpret=interpreter)
    groups = jnp.asarray(sizes, jnp.int32)

    forward = functools.partial(matmul_activation, jnp.asarray(rows), jnp.asarray(w_in), groups, **settings)
    out, hidden = forward(residual="pre")
    if tile.cluster == 2 and num_rows == ROWS:
        for other in ("hidden", None):
            nothing, same = forward(residual=other)
            assert nothing is None
            np.testing.assert_array_equal(np.asarray(hidden), np.asarray(same))
    assert_close(out, reference.grouped_matmul(rows, w_in, sizes), dtype, "pre")
    assert_close(hidden, activation_of_rows(config, np.float64(out))[0], dtype, "hidden")

    arguments = map(jnp.asarray, (dout, w_out, groups, kept, row_weights))
    grads = kernel_grad(*arguments, residual=residual, **settings)
    expected = matmul_activation_grad(config, dout, w_out, sizes, np.float64(kept), np.float64(row_weights), residual)
    assert [value is None for value in grads] == [ref is None for ref in expected]
    for label, value, ref in zip(("dpre", "hidden", "drow_weights"), grads, expected, strict=True):
        if ref is not None:
            assert_close(value, ref, dtype, label)
    assert grads[2].dtype == jnp.float32
    for value in (out, hidden, *jax.tree.leaves(grads)):
        assert not value[sum(sizes) :].any()


# Formulas are compared for every activation in test_values_and_slopes; interpretation is slow.
@pytest.mark.parametrize(
    ("name", "residual", "gated"), drawn(((*row, variant(row[0])[0].gated) for row in RESIDUALS), 4)
)
def test_activations_and_residuals(rng, name, residual, gated, interpreter):
    check(rng, interpreter, name, UNEVEN, (GATED_TILES if gated else PLAIN_TILES)[0], residual=residual)


@pytest.mark.parametrize(("name", "tile"), drawn(itertools.product(["relu2", "swiglu"], ["tall", "cluster"]), 2))
def test_tiles(rng, name, tile, interpreter):
    """Columns that no tile divides, in bands and clusters."""
    tiles, dtype = (GATED_TILES, "bfloat16") if name == "swiglu" else (PLAIN_TILES, "float16")
    check(rng, interpreter, name, UNEVEN, tiles[["tall", "cluster"].index(tile) + 1], dtype)


GROUPS = {"none": ([0] * 5, 20), "one": ([0, 0, 1, 0, 0], 1), "75": ([3, 0, 0, 70, 2], 75)}


@pytest.mark.parametrize(("name", "groups"), drawn(itertools.product(["relu2", "swiglu"], GROUPS), 3))
def test_groups(rng, name, groups, interpreter):
    """No rows, one row, and rows that no block divides, all of them owned."""
    sizes, num_rows = GROUPS[groups]
    check(rng, interpreter, name, sizes, (GATED_TILES if name == "swiglu" else PLAIN_TILES)[2], num_rows=num_rows)


@every_activation
def test_values_and_slopes(name):
    """The kernels' own formulas in float32, from where they saturate to where they vanish."""
    activation, config = variant(name)
    x = np.concatenate([np.linspace(-30, 30, 1001), np.logspace(-6, 2, 100), -np.logspace(-6, 2, 100)])
    parts = [x, x[::-1]] if config.gated else [x]
    parts = [jnp.asarray(part[None], jnp.float32) for part in parts]
    value, slopes = value_and_slopes(activation, parts)
    expected, expected_slopes = activation_of_rows(config, np.concatenate(parts, axis=1, dtype=np.float64))
    assert_close(value, expected, "float32")
    assert_close(np.concatenate(slopes, axis=1), expected_slopes, "float32")
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-6)
    # If situ_glu saturates, 1 - tanh^2 is off by some roundings of 1, which its bounds multiply.
    rounding = 2 * np.finfo(np.float32).eps * activation.beta * activation.linear_beta
    np.testing.assert_allclose(np.concatenate(slopes, axis=1), expected_slopes, rtol=1e-3, atol=max(1e-5, rounding))
    for residual, kept in (("pre", parts), ("hidden", [value])):
        if (name, residual) in RESIDUALS:
            same, slopes_of_residual = value_and_slopes_of_residual(activation, residual, kept)
            np.testing.assert_array_equal(same, value)
            assert_close(np.concatenate(slopes_of_residual, axis=1), expected_slopes, "float32", residual)


LOWERED = itertools.product(RESIDUALS, ["bfloat16", "float16"], ["large", "decode"])


@pytest.mark.parametrize(("variant", "dtype", "size"), drawn(LOWERED, 8), ids=str)
def test_lowers_for_cuda(variant, dtype, size):
    """Layouts and shared memory at the sizes of Nemotron-3 Super, gated of Qwen3-30B-A3B; the lowering needs no GPU."""
    name, residual = variant
    activation = bound_activation(name)
    rows, experts, latent, hidden = (131072, 128, 2048, 768) if activation.gated else (180224, 512, 1024, 2688)
    rows = rows if size == "large" else 23
    width = hidden * (2 if activation.gated else 1)

    def product(contraction, kept, lhs, w, *more):
        epilogue = Epilogue(activation, kept)
        asked = problem(contraction, rows, w.shape, dtype, epilogue=epilogue, device=H200)
        backend = Pallas(PallasBackend(fuse="always"))
        assert backend.supports(asked) is None
        outputs = bind(backend, asked)(Operands(lhs, w, *more))
        return outputs.out, outputs.residual, outputs.hidden, outputs.row_weight_gradients

    def run(lhs, w_in, w_out, kept, row_weights, sizes):
        return (
            product("fwd", residual, lhs, w_in, sizes),
            product("fwd", None, lhs, w_in, sizes),
            product("dgrad", residual, lhs, w_out, sizes, kept, row_weights),
        )

    shapes = (rows, latent), (experts, latent, width), (experts, hidden, latent), (rows, width)
    arguments = *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((rows,), jnp.float32)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    lowered = jax.jit(run).trace(*arguments, sizes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 3
    keeps, keeps_nothing, gradient = lowered.out_info
    assert keeps[0].shape == keeps_nothing[0].shape == (rows, hidden)
    assert keeps[1].shape == (rows, width)
    assert keeps_nothing[1] is None
    assert [value and value.shape for value in gradient] == [
        (rows, width),
        None,
        (rows, hidden) if residual == "pre" else None,
        (rows,),
    ]


def plain(contraction, **changes):
    return dataclasses.replace(problem(contraction, 4096, (64, 256, 512), "bfloat16", device=H200), **changes)


def residual_of(name):
    return "hidden" if name == "relu2" else "pre"


def fuses(contraction, name, backend, residual=None, **changes):
    epilogue = Epilogue(bound_activation(name), residual or residual_of(name))
    return fused(select(plain(contraction, **changes), backend), epilogue) is not None


@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
def test_fuse_says_what_is_fused(contraction):
    for name in KERNEL_ACTIVATIONS:
        faster = name in FASTER[contraction]
        for fuse, expected in (("always", True), ("measured", faster), ("never", False)):
            assert fuses(contraction, name, PallasBackend(fuse=fuse)) == expected


@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
def test_gate_and_hidden_rows_side_by_side_are_refused(contraction):
    for name in ("swiglu", "geglu", "geglu_tanh"):
        assert not fuses(contraction, name, PallasBackend(fuse="always"), "gate_hidden")
    epilogue = Epilogue(bound_activation("swiglu"), "gate_hidden")
    reason = Pallas(PallasBackend(fuse="always")).supports(plain(contraction, epilogue=epilogue))
    assert "not gate and hidden rows side by side" in reason


def test_halves_that_no_block_divides_are_refused():
    odd, backend = dict(n=192), PallasBackend(fuse="always")
    epilogue = Epilogue(bound_activation("swiglu"), "pre")
    assert "half of n=192" in Pallas(backend).supports(plain("fwd", epilogue=epilogue, **odd))
    assert not fuses("fwd", "swiglu", backend, **odd)
    assert fuses("fwd", "relu2", backend, **odd)
    assert fuses("dgrad", "swiglu", backend, **odd)


@every_activation
@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
def test_explain_names_the_tile(name, contraction):
    for num_rows in (100, 100000):
        epilogue = Epilogue(bound_activation(name), residual_of(name))
        text = explain(plain(contraction, num_rows=num_rows, epilogue=epilogue), PallasBackend(fuse="always"))
        assert f"{contraction} with {epilogue} of bfloat16" in text
        assert "  tile: PallasMatmulTile(rows=" in text
        assert "from a heuristic: no table has this problem" in text
