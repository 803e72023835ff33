"""The kernel of the projections of one token on a Hopper GPU, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import RouterConfig, XlaBackend, init_params, latent_moe, projections
from jax_latent_moe.native import library
from tests.few_tokens import check_projections, layer, projection_operands
from tests.gpu.grouped import float64, needs_hopper
from tests.tolerances import assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]
check = functools.partial(check_projections, again=3)


def test_super(rng):
    """Its router and down-projection, and its up-projection."""
    check(*projection_operands(rng, 4096, 512, 1024))
    check(*projection_operands(rng, 1024, 0, 4096))


@pytest.mark.parametrize("parts", projections.PARTS)
def test_parts_and_sizes_that_no_tile_divides(rng, monkeypatch, parts):
    monkeypatch.setattr(projections, "parts_of", lambda weights, num_sms: parts)
    for k, experts, width in ((701, 36, 72), (2300, 4, 8), (3, 508, 136), (8192, 512, 2048)):
        check(*projection_operands(rng, k, experts, width))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_and_one_product_alone(rng, dtype):
    for kernel_dtype in ("float32", dtype):
        for experts, width in ((512, 0), (0, 72), (8, 1024)):
            check(*projection_operands(rng, 2048, experts, width, dtype, kernel_dtype))


def test_a_token_of_nan(rng):
    x, kernel, projection = projection_operands(rng, 4096, 512, 1024)
    check(x * jnp.nan, kernel, projection)


@pytest.mark.parametrize("latent", [128, None])
def test_the_layer_in_a_compiled_loop(rng, latent):
    """As the portable backend computes each step, and the same bits again."""
    changes = dict(dtype="bfloat16", param_dtype="bfloat16", hidden_size=256, latent_size=latent)
    # A bias of the logits comes between the kernels, so one call does not run them all.
    config = layer("relu2", 128, 32, 6, 256, router=RouterConfig(logit_bias=True), **changes)
    params = init_params(jax.random.key(0), config)
    x = jnp.asarray(rng.normal(size=(1, 256)), jnp.bfloat16)

    def step(config, x):
        y = latent_moe(params, x, config)[0]
        return (x + y / jnp.sqrt(jnp.mean(jnp.square(y.astype(jnp.float32)), -1, keepdims=True))).astype(x.dtype)

    loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (step(config, x), x), x, length=20))
    assert "latent_moe_decode_projections" in loop.lower(x).as_text()
    portable = jax.jit(functools.partial(step, dataclasses.replace(config, backend=XlaBackend())))
    last, steps = loop(x)
    for before, after in zip(steps, [*steps[1:], last], strict=True):
        assert_close(float64(after), float64(portable(before)), "bfloat16")
    np.testing.assert_array_equal(float64(loop(x)[0]), float64(last))
