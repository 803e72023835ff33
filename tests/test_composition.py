"""The whole layer under the transformations of JAX, for both methods of the portable backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import RouterConfig, XlaBackend, init_params, latent_moe, pin_choice
from jax_latent_moe.experts import RESIDUAL
from jax_latent_moe.layer import LATENT
from tests.cases import TOY
from tests.tolerances import assert_close, assert_trees_close

LAYERS, TOKENS = 3, 5
BASE = dataclasses.replace(
    TOY, activation="swiglu", latent_norm="post",
    router=RouterConfig(switch_loss_coef=0.1, z_loss_coef=0.1, capacity_factor=1.5),
)  # fmt: skip
CONFIGS = [
    dataclasses.replace(BASE, backend=backend)
    for backend in (XlaBackend(block_rows=4), XlaBackend(method="ragged_dot"))
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["blocked", "ragged_dot"])


def stacked_params(rng, config):
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), LAYERS)
    return jax.vmap(lambda key: init_params(key, config))(keys)


def one(params, i):
    return jax.tree.map(lambda leaf: leaf[i], params)


def inputs(rng, *leading):
    return jnp.float32(rng.normal(size=(*leading, TOKENS, TOY.hidden_size)))


@functools.cache
def layer(config):
    return jax.jit(functools.partial(latent_moe, config=config))


def total(y, aux):
    return jnp.sum(jnp.sin(y)) + sum(aux.losses.values())


@functools.cache
def gradient(config):
    return jax.jit(jax.grad(lambda params, x: total(*latent_moe(params, x, config)), (0, 1)))


@every_config
def test_vmap_over_inputs(rng, config):
    """Each mapped batch has its own capacity, counts and losses."""
    params, x = one(stacked_params(rng, config), 0), inputs(rng, 2)
    y, aux = jax.jit(jax.vmap(functools.partial(latent_moe, config=config), (None, 0)))(params, x)
    for i in range(2):
        expected, expected_aux = layer(config)(params, x[i])
        assert_close(y[i], expected, "float32")
        np.testing.assert_array_equal(aux.expert_ids[i], expected_aux.expert_ids)
        np.testing.assert_array_equal(aux.dropped_per_expert[i], expected_aux.dropped_per_expert)
        assert_trees_close(one(aux.losses, i), expected_aux.losses, "float32")


@every_config
def test_vmap_of_the_gradient_over_layers(rng, config):
    params, x = stacked_params(rng, config), inputs(rng, LAYERS)
    dparams, dx = jax.jit(jax.vmap(gradient(config)))(params, x)
    for i in range(LAYERS):
        expected, expected_x = gradient(config)(one(params, i), x[i])
        assert_trees_close(one(dparams, i), expected, "float32")
        assert_close(dx[i], expected_x, "float32")


@every_config
@pytest.mark.parametrize("remat", ["nothing", "everything", "named"])
def test_scan_over_layers(rng, config, remat):
    """Also with everything made again in the backward pass, and with all but the two named arrays."""
    params, x = stacked_params(rng, config), inputs(rng)
    policy = jax.checkpoint_policies.save_only_these_names(LATENT, RESIDUAL) if remat == "named" else None

    def block(x, params):
        y, aux = latent_moe(params, x, config)
        return x + y, sum(aux.losses.values())

    def by_scan(params, x):
        body = block if remat == "nothing" else jax.checkpoint(block, policy=policy)
        x, losses = jax.lax.scan(body, x, params)
        return jnp.sum(jnp.sin(x)) + jnp.sum(losses)

    def by_loop(params, x):
        loss = 0.0
        for i in range(LAYERS):
            y, aux = layer(config)(one(params, i), x)
            x, loss = x + y, loss + sum(aux.losses.values())
        return jnp.sum(jnp.sin(x)) + loss

    gradients = jax.jit(jax.grad(by_scan, (0, 1)))(params, x)
    expected = jax.grad(by_loop, (0, 1))(params, x)
    assert_trees_close(gradients[0], expected[0], "float32")
    assert_close(gradients[1], expected[1], "float32")


@every_config
def test_a_pinned_choice_is_made_once(rng, config):
    """Without the policy a rematerialised layer chooses again in the backward pass."""
    router = dataclasses.replace(config.router, drop_policy="probs", sequence_loss_coef=0.1)
    config = dataclasses.replace(config, router=router)
    params, x = one(stacked_params(rng, config), 0), inputs(rng)

    def gradient(policy):
        block = jax.checkpoint(lambda params, x: total(*latent_moe(params, x, config)), policy=policy)
        return jax.grad(block, (0, 1))

    def choices(policy):
        text = str(jax.make_jaxpr(gradient(policy))(params, x))
        return text.count(" top_k["), text.count("num_keys=2")  # experts and losses; what capacity keeps

    assert choices(pin_choice) == (2, 1)
    assert choices(None) == (4, 2)
    for found, wanted in zip(*(jax.jit(gradient(policy))(params, x) for policy in (pin_choice, None)), strict=True):
        jax.tree.map(lambda a, b: assert_close(a, b, "float32"), found, wanted)


@every_config
def test_export_with_gradients(rng, config):
    params, x = one(stacked_params(rng, config), 0), inputs(rng)
    exported = jax.export.export(gradient(config))(params, x)
    dparams, dx = exported.call(params, x)
    expected, expected_x = gradient(config)(params, x)
    assert_trees_close(dparams, expected, "float32")
    assert_close(dx, expected_x, "float32")


@every_config
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(rng, config, platform):
    lowered = gradient(config).trace(one(stacked_params(rng, config), 0), inputs(rng)).lower(
        lowering_platforms=(platform,)
    )  # fmt: skip
    assert "func.func public @main" in lowered.as_text()


@every_config
def test_one_trace_per_shape(rng, config):
    traces = []

    @jax.jit
    def run(params, x, token_mask, expert_ids):
        traces.append(x.shape)
        return latent_moe(params, x, config, token_mask=token_mask, expert_ids=expert_ids)

    params = stacked_params(rng, config)
    for i in range(LAYERS):
        mask, ids = rng.random(TOKENS) < 0.5, rng.integers(-1, 8, size=(TOKENS, 3))
        run(one(params, i), inputs(rng), mask, ids)
    assert traces == [(TOKENS, TOY.hidden_size)]


def test_forward_mode_is_refused_in_one_clear_error(rng):
    """The routed block has only a reverse-mode rule."""
    params, x = one(stacked_params(rng, BASE), 0), inputs(rng)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: latent_moe(params, x, BASE)[0], (x,), (x,))


def test_the_gradient_of_a_gradient(rng):
    """A gradient penalty, reverse over reverse, against a difference of gradients; ids are constants under jit."""
    router = RouterConfig(dtype="float64")
    config = dataclasses.replace(TOY, activation="swiglu", dtype="float64", param_dtype="float64", router=router)
    with jax.enable_x64(True):
        params = init_params(jax.random.key(int(rng.integers(2**31))), config)
        x, direction = jnp.asarray(rng.normal(size=(2, TOKENS, TOY.hidden_size)))
        ids = latent_moe(params, x, config)[1].expert_ids

        @jax.jit
        def slope(x):
            gradient = jax.grad(lambda x: jnp.sum(latent_moe(params, x, config, expert_ids=ids)[0] ** 2))(x)
            return jnp.sum(gradient * direction)

        step = 1e-5
        difference = (slope(x + step * direction) - slope(x - step * direction)) / (2 * step)
        curvature = jnp.sum(jax.jit(jax.grad(slope))(x) * direction)
        assert float(curvature) == pytest.approx(float(difference), rel=1e-4, abs=1e-6)
