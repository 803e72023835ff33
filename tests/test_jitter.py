"""Input jitter: only the router reads it, its factors are documented, and training without a key is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, InputError, RouterConfig, init_params, latent_moe
from tests import cases, layers
from tests.cases import TOY

JITTER = RouterConfig(input_jitter=0.25, z_loss_coef=0.1)
CONFIG = dataclasses.replace(TOY, router=JITTER)


@pytest.mark.parametrize("latent", [None, 6])
def test_against_the_oracle(rng, latent):
    """The oracle's router reads x times the factors; projections and shared expert read x."""
    config = dataclasses.replace(CONFIG, latent_size=latent)
    layers.check_against_oracle(cases.random_inputs(rng, config, (2, 3), masked=True))


@pytest.fixture(scope="module")
def run():
    params, x = init_params(jax.random.key(0), CONFIG), jax.random.normal(jax.random.key(1), (5, 12))
    return jax.jit(lambda key: latent_moe(params, x, CONFIG, key=key)), params, x


def test_old_and_typed_keys_agree_and_keys_differ(run):
    layer, *_ = run
    typed, _ = layer(jax.random.key(3))
    old, _ = layer(jax.random.PRNGKey(3))
    other, _ = layer(jax.random.key(4))
    np.testing.assert_array_equal(typed, old)
    assert not np.array_equal(typed, other)


def test_without_a_key_it_evaluates_as_without_jitter(run):
    layer, params, x = run
    still = dataclasses.replace(TOY, router=dataclasses.replace(JITTER, input_jitter=0.0))
    np.testing.assert_array_equal(layer(None)[0], jax.jit(lambda: latent_moe(params, x, still))()[0])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_without_a_key_it_does_not_train(run, transform):
    _, params, x = run
    loss = transform(lambda params: jnp.sum(latent_moe(params, x, CONFIG)[0]))
    with pytest.raises(InputError, match=r"router.input_jitter=0.25 needs a key in training: give latent_moe a key"):
        jax.eval_shape(jax.grad(loss), params)


@pytest.mark.parametrize(
    ("router", "key", "message"),
    [
        (RouterConfig(), jax.random.key(0), "key has no effect without router.input_jitter"),
        (JITTER, jax.random.split(jax.random.key(0)), r"key of shape \(2,\) .* must be a single key"),
        (JITTER, np.zeros(2), r"key of shape \(2,\) and dtype float64 must be a single key"),
        (JITTER, 0, "key of type int must be a single key"),
    ],
)
def test_what_is_not_its_key_is_refused(run, router, key, message):
    _, params, x = run
    with pytest.raises(InputError, match=message):
        latent_moe(params, x, dataclasses.replace(TOY, router=router), key=key)


def test_factors_must_be_positive():
    with pytest.raises(ConfigError, match=r"router.input_jitter=1.0 must be less than 1"):
        RouterConfig(input_jitter=1.0)
