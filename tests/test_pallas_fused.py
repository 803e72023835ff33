"""The fused Pallas kernels without a GPU: interpreted against the oracle with race detection, and lowered for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax_latent_moe.grouped_matmul.fused import ACTIVATIONS, FASTER, FusedActivation
from jax_latent_moe.grouped_matmul.pallas_hopper import Pallas

from jax_latent_moe.config import LatentMoEConfig, PallasBackend, PallasMatmulTile
from jax_latent_moe.grouped_matmul import Problem, explain, pallas_hopper_fused, reference, select_fusing
from jax_latent_moe.grouped_matmul.pallas_sm90.activations import value_and_slopes, value_and_slopes_of_kept
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
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def variant(name):
    """The activation as kernels know it, and the config by which the oracle does."""
    config = LatentMoEConfig(
        8, 4, 8, 2, 8, activation=name.removesuffix("_tanh"), gelu_approximate=name.endswith("_tanh")
    )
    betas = (config.situ_beta, config.situ_linear_beta) if name == "situ_glu" else ()
    return FusedActivation(name, *betas), config


def operands(rng, dtype, config, sizes, num_rows=ROWS):
    """Rows, both weights, output gradients, what is kept and rows' weights; NaN where rows belong to nobody."""
    width = HIDDEN * (2 if config.gated else 1)
    shapes = (num_rows, IN), (EXPERTS, IN, width), (num_rows, IN), (EXPERTS, HIDDEN, IN), (num_rows, width)
    rows, w_in, dout, w_out, pre = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    row_weights = rng.random(num_rows, np.float32)
    for x in (rows, dout, pre, row_weights):
        x[sum(sizes) :] = np.nan
    kept = kept_of(config, 2 * pre)
    return *(x.astype(jnp.dtype(dtype)) for x in (rows, w_in / 8, dout, w_out / 8, kept)), row_weights


@pytest.fixture
def interpreter():
    """Parameters of the interpreter; no race may have been found when the test ends."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not gpu_callbacks.get_races().races_found


def check(rng, interpreter, name, sizes, tile, dtype="bfloat16", num_rows=ROWS):
    """Both fused products against the oracle; exact zeros in the rows of nobody."""
    activation, config = variant(name)
    rows, w_in, dout, w_out, kept, row_weights = operands(rng, dtype, config, sizes, num_rows)
    settings = dict(activation=activation, tile=tile, num_sms=2 * tile.cluster, interpret=interpreter)
    groups = jnp.asarray(sizes, jnp.int32)

    forward = functools.partial(
        pallas_hopper_fused.matmul_activation, jnp.asarray(rows), jnp.asarray(w_in), groups, **settings
    )
    out, hidden = forward(keep_pre=True)
    if tile.cluster == 2:
        nothing, same = forward(keep_pre=False)
        assert nothing is None
        np.testing.assert_array_equal(np.asarray(hidden), np.asarray(same))
    assert_close(out, reference.grouped_matmul(rows, w_in, sizes), dtype, "pre")
    assert_close(hidden, activation_of_rows(config, np.float64(out))[0], dtype, "hidden")

    arguments = map(jnp.asarray, (dout, w_out, groups, kept, row_weights))
    grads = pallas_hopper_fused.matmul_activation_grad(*arguments, **settings)
    expected = matmul_activation_grad(config, dout, w_out, sizes, np.float64(kept), np.float64(row_weights))
    assert [value is None for value in grads] == [ref is None for ref in expected]
    for label, value, ref in zip(("dpre", "hidden", "drow_weights"), grads, expected, strict=True):
        if ref is not None:
            assert_close(value, ref, dtype, label)
    assert grads[2].dtype == jnp.float32
    for value in (out, hidden, *jax.tree.leaves(grads)):
        assert not value[sum(sizes) :].any()


@every_activation
def test_every_activation(rng, name, interpreter):
    gated = variant(name)[0].gated
    check(rng, interpreter, name, UNEVEN, (GATED_TILES if gated else PLAIN_TILES)[0])


@pytest.mark.parametrize("tile", [1, 2], ids=["tall", "cluster"])
@pytest.mark.parametrize(("name", "dtype"), [("relu2", "float16"), ("swiglu", "bfloat16")])
def test_tiles(rng, name, dtype, tile, interpreter):
    """Columns that no tile divides, in bands and clusters."""
    check(rng, interpreter, name, UNEVEN, (GATED_TILES if name == "swiglu" else PLAIN_TILES)[tile], dtype)


@pytest.mark.parametrize(
    ("sizes", "num_rows"), [([0] * 5, 20), ([0, 0, 1, 0, 0], 1), ([3, 0, 0, 70, 2], 75)], ids=["none", "one", "75"]
)
@pytest.mark.parametrize("name", ["relu2", "swiglu"])
def test_groups(rng, name, sizes, num_rows, interpreter):
    """No rows, one row, and rows that no block divides, all of them owned."""
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
    # Where situ_glu saturates, 1 - tanh^2 is right to some roundings of 1, which its bounds multiply.
    rounding = 2 * np.finfo(np.float32).eps * activation.beta * activation.linear_beta
    np.testing.assert_allclose(np.concatenate(slopes, axis=1), expected_slopes, rtol=1e-3, atol=max(1e-5, rounding))
    same, slopes_of_kept = value_and_slopes_of_kept(activation, [value] if activation.keeps_hidden else parts)
    np.testing.assert_array_equal(same, value)
    assert_close(np.concatenate(slopes_of_kept, axis=1), expected_slopes, "float32")


@every_activation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("large", [True, False], ids=["large", "decode"])
def test_lowers_for_cuda(name, dtype, large):
    """Layouts and shared memory at the sizes of Nemotron-3 Super, gated of Qwen3-30B-A3B; the lowering needs no GPU."""
    activation, _ = variant(name)
    rows, experts, latent, hidden = (131072, 128, 2048, 768) if activation.gated else (180224, 512, 1024, 2688)
    rows = rows if large else 23
    width = hidden * (2 if activation.gated else 1)
    backend = Pallas(PallasBackend())

    def run(rows, w_in, w_out, kept, row_weights, sizes):
        return (
            backend.matmul_activation(rows, w_in, sizes, activation=activation, keep_pre=True),
            backend.matmul_activation(rows, w_in, sizes, activation=activation, keep_pre=False),
            backend.matmul_activation_grad(rows, w_out, sizes, kept, row_weights, activation=activation),
        )

    shapes = (rows, latent), (experts, latent, width), (experts, hidden, latent), (rows, width)
    arguments = *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((rows,), jnp.float32)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    text = jax.jit(run).trace(*arguments, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3


def problem(contraction, name, **changes):
    h200 = Problem(contraction, 4096, 64, 256, 512, "bfloat16", "gpu", "NVIDIA H200", variant(name)[0])
    return dataclasses.replace(h200, **changes)


@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
def test_fuse_says_what_is_fused(contraction):
    for name in ACTIVATIONS:
        faster = name in FASTER["pallas"][contraction]
        for fuse, expected in (("always", True), ("measured", faster), ("never", False)):
            chosen = select_fusing(problem(contraction, name), PallasBackend(fuse=fuse))
            assert (chosen is not None) == expected


def test_halves_that_no_block_divides_are_refused():
    odd, backend = dict(out_features=192), PallasBackend(fuse="always")
    assert "half of out_features=192" in Pallas(backend).supports(problem("fwd", "swiglu", **odd))
    assert select_fusing(problem("fwd", "relu2", **odd), backend) is not None
    assert select_fusing(problem("dgrad", "swiglu", **odd), backend) is not None


@every_activation
@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
def test_explain_names_the_tile(name, contraction):
    for num_rows in (100, 100000):
        text = explain(problem(contraction, name, num_rows=num_rows), PallasBackend(fuse="always"))
        assert "from a heuristic: fused products are not tuned" in text
