"""One token's routed part in one call on a Hopper GPU, against the portable backend on the layer's own choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import RouterConfig, XlaBackend, init_params, latent_moe, quantize
from jax_latent_moe.native import library
from tests.few_tokens import WEIGHINGS, layer
from tests.gpu.grouped import float64, needs_hopper
from tests.tolerances import assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]
TARGET = "latent_moe_decode_token"


def token_layer(**changes):
    sizes = dict(hidden_size=1024, dtype="bfloat16", param_dtype="bfloat16", router=RouterConfig())
    return dataclasses.replace(layer("relu2", 256, 512, 22, 384, **sizes), **changes)


def layer_params(config):
    """Parameters with a bias that changes the choice."""
    params = init_params(jax.random.key(0), config)
    if config.router.correction_bias:
        params["router"]["bias"] = jax.random.normal(jax.random.key(1), (config.num_experts,), jnp.float32)
    return params


def chosen_in_float64(config, params, logits):
    """The scores of the choice in float64, by logits that the layer computed."""
    by_logit = config.router.selection == "logit" or not config.router.correction_bias
    scores = logits if by_logit else 1 / (1 + np.exp(-logits))
    return scores + (float64(params["router"]["bias"]) if config.router.correction_bias else 0)


def check(rng, config, params, tokens=6):
    """The call's choice, and what the portable backend makes of it; the same bits again."""
    portable = jax.jit(functools.partial(latent_moe, config=dataclasses.replace(config, backend=XlaBackend())))
    program = jax.jit(latent_moe, static_argnums=2).lower(
        params, jnp.zeros((1, config.hidden_size), config.dtype), config
    )
    assert program.as_text().count(TARGET) == 1
    compiled = program.compile()
    for _ in range(tokens):
        x = jnp.asarray(rng.normal(size=(1, config.hidden_size)), config.dtype)
        y, aux = compiled(params, x)
        wanted, replayed = portable(params, x, expert_ids=aux.expert_ids)
        assert_close(float64(y), float64(wanted), config.dtype)
        np.testing.assert_allclose(aux.weights, replayed.weights, rtol=1e-4)
        logits = float64(x) @ float64(params["router"]["kernel"])
        scores, ids = chosen_in_float64(config, params, logits)[0], np.asarray(aux.expert_ids)[0]
        assert len(set(ids)) == config.top_k
        least, others = scores[ids].min(), np.delete(scores, ids)
        assert least >= (others.max() if others.size else -np.inf) - 1e-5
        assert (np.diff(scores[ids]) <= 1e-5).all()
        np.testing.assert_array_equal(float64(compiled(params, x)[0]), float64(y))


SELECTIONS = {
    "by the logits alone": RouterConfig(correction_bias=False),
    "by biased logits": RouterConfig(selection="logit"),
    **{name: router for name, router in WEIGHINGS.items() if router.score_function != "softmax_topk"},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_routers(rng, name):
    config = token_layer(router=SELECTIONS[name])
    check(rng, config, layer_params(config))


CHANGES = {
    "gated": dict(activation="swiglu"),
    "no latents": dict(latent_size=None),
    "a norm behind the sum": dict(latent_norm="post"),
    "a shared expert": dict(shared_expert_intermediate_size=24),
    "float16": dict(dtype="float16", param_dtype="float16"),
    "a router in float32": dict(param_dtype="float32"),
    "all experts": dict(num_experts=32, top_k=32),
    "many experts": dict(num_experts=1024, top_k=9),
    "sizes that no tile divides": dict(hidden_size=712, latent_size=104, expert_intermediate_size=88, num_experts=40),
}


@pytest.mark.parametrize("name", CHANGES)
def test_layers(rng, name):
    config = token_layer(**CHANGES[name])
    check(rng, config, layer_params(config))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4_32_zero", "int8", "fp8_block"])
def test_codes(rng, format):
    config = token_layer()
    check(rng, config, quantize(layer_params(config), config, format))


@pytest.mark.parametrize("format", [None, "mxfp4"])
def test_a_compiled_loop(rng, format):
    """Kernels begin while those before run, and step follows step. All have the bits of single calls."""
    config = token_layer()
    params = layer_params(config)
    params = params if format is None else quantize(params, config, format)
    x = jnp.asarray(rng.normal(size=(1, config.hidden_size)), config.dtype)

    def step(x):
        y = latent_moe(params, x, config)[0]
        return (x + y / jnp.sqrt(jnp.mean(jnp.square(y.astype(jnp.float32)), -1, keepdims=True))).astype(x.dtype)

    last, steps = jax.jit(lambda x: jax.lax.scan(lambda x, _: (step(x), x), x, length=200))(x)
    single = jax.jit(step)
    for before, after in zip(steps, [*steps[1:], last], strict=True):
        np.testing.assert_array_equal(float64(single(before)), float64(after))
