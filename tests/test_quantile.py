"""Quantile balancing: the target against a sort and Megatron's steps, and the step that moves the bias to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_latent_moe.linen
import jax_latent_moe.nnx
from jax_latent_moe import ConfigError, RouterConfig, after_step, init_params, latent_moe, split_state
from jax_latent_moe.routing.quantile import move_to_target, nth_largest, target_bias
from jax_latent_moe.routing.router import route
from tests.cases import TOY
from tests.parallel.meshes import BASE, make_mesh

QUANTILE = RouterConfig(bias_update="quantile", bias_update_rate=0.75)
CONFIG = dataclasses.replace(TOY, router=QUANTILE)


def expected_target(scores, bias, top_k, mask):
    """megatron/core/transformer/moe/moe_utils.py, qb_dual_update, on the real tokens; beta is minus the bias."""
    scores, beta = np.float64(scores)[mask], -np.float64(bias)
    alpha = np.sort(scores - beta, axis=1)[:, ::-1][:, top_k]
    return -np.sort(scores - alpha[:, None], axis=0)[::-1][len(scores) * top_k // scores.shape[1]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_target_is_megatrons(rng, top_k, masked):
    scores, bias = np.float32(rng.normal(size=(40, 8))), np.float32(rng.normal(size=8))
    mask = rng.random(40) < (0.6 if masked else 1.1)
    found = target_bias(scores, bias, top_k, mask if masked else None)
    np.testing.assert_allclose(found, expected_target(scores, bias, top_k, mask), rtol=1e-6, atol=1e-6)


def test_all_tokens_masked_keep_the_bias():
    bias = jnp.arange(4.0)
    with jax.debug_nans(True):
        np.testing.assert_array_equal(target_bias(jnp.zeros((3, 4)), bias, 1, np.zeros(3, bool)), bias)


def test_nth_largest_of_any_floats():
    """Signed zeros, infinities, denormals and huge numbers, in every rank."""
    column = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0], np.float32)
    values = np.stack([column, column[::-1]], axis=1)
    everything = np.ones(len(column), bool)
    for n, expected in enumerate(np.sort(column)[::-1]):
        found = nth_largest(values, jnp.int32(n), everything, lambda v: v)
        np.testing.assert_array_equal(found, [expected, expected])


def test_a_few_steps_balance_the_loads(rng):
    """Logits that favour the last experts: with Megatron's rate of 1, each of 8 experts then has about 256 * 2 / 8."""
    logits = jnp.float32(rng.normal(size=(256, 8)) + np.linspace(0, 3, 8))
    config = dataclasses.replace(QUANTILE, selection="logit", bias_update_rate=1.0)
    bias = jnp.zeros(8)
    for _ in range(20):
        bias = move_to_target(bias, target_bias(logits, bias, 2), config.bias_update_rate)
    counts = np.bincount(np.asarray(route(logits, config, 2, bias=bias).expert_ids).reshape(-1), minlength=8)
    assert abs(counts - 64).max() <= 12  # 10 is the most in 300 draws of a float64 copy
    assert abs(float(bias.mean())) < 1e-6


@pytest.fixture(scope="module")
def steps():
    """Two microbatches: parameters, inputs, and what the layer says of each."""
    rng = np.random.default_rng(0)
    params = init_params(jax.random.key(0), CONFIG)
    params["router"]["bias"] = jnp.float32(rng.normal(size=8))
    xs = [jnp.float32(rng.normal(size=(5, 12))) for _ in range(2)]
    layer = jax.jit(lambda x: latent_moe(params, x, CONFIG)[1])
    return params, xs, [layer(x) for x in xs]


def check_moved(params, auxes, moved):
    bias = np.float64(params["router"]["bias"])
    target = np.mean([np.float64(aux.bias_target) for aux in auxes], axis=0)
    expected = bias + QUANTILE.bias_update_rate * (target - bias)
    np.testing.assert_allclose(moved, expected - expected.mean(), atol=1e-6)


def test_the_layer_gives_the_target_of_its_choice_scores(steps):
    params, xs, auxes = steps
    scores = 1 / (1 + np.exp(-np.float64(xs[0]) @ np.float64(params["router"]["kernel"])))
    expected = expected_target(scores, params["router"]["bias"], TOY.top_k, np.ones(5, bool))
    np.testing.assert_allclose(auxes[0].bias_target, expected, atol=1e-6)


def test_after_step(steps):
    params, _, auxes = steps
    _, state = split_state(params)
    rate = QUANTILE.bias_update_rate
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *auxes)
    for aux in (auxes, stacked):
        check_moved(params, auxes, after_step(state, aux, rate)["router"]["bias"])
    check_moved(params, auxes[:1], after_step(state, auxes[0], rate)["router"]["bias"])


def test_linen_and_nnx(steps):
    params, xs, auxes = steps
    variables = jax_latent_moe.linen.from_params(params, CONFIG)
    layer, model = jax_latent_moe.linen.LatentMoE(CONFIG), jax_latent_moe.nnx.from_params(params, CONFIG)
    capture = nnx.capture(model, nnx.Intermediate)
    sown = [layer.apply(variables, x, mutable=["losses", "intermediates"])[1] for x in xs]
    total = jax.tree.map(jnp.add, *map(jax_latent_moe.linen.loads, sown))
    after = jax_latent_moe.linen.to_params(jax_latent_moe.linen.after_step(variables, total, 0.75))
    check_moved(params, auxes, after["router"]["bias"])
    total = jax.tree.map(jnp.add, *(jax_latent_moe.nnx.loads(capture(x)[1]) for x in xs))
    jax_latent_moe.nnx.update_correction_bias(model, total)
    check_moved(params, auxes, model.router["bias"][...])


def test_a_mesh_gives_the_target_of_one_device(rng):
    config = dataclasses.replace(BASE, router=QUANTILE)
    params, x = init_params(jax.random.key(0), config), jnp.float32(rng.normal(size=(4, 4, 16)))
    layer = jax.jit(lambda params: latent_moe(params, x, config)[1].bias_target)
    alone = layer(params)
    with jax.set_mesh(make_mesh(2, 2, names=("data", "sequence"))):
        np.testing.assert_allclose(jax.jit(lambda p: latent_moe(p, x, config)[1].bias_target)(params), alone, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 2}, "router.bias_update='quantile' with router.num_groups=2: it needs num_groups=1"),
        ({"bias_update_rate": 1.5}, "with router.bias_update_rate=1.5: it needs"),
        ({"correction_bias": False}, "router.bias_update(_rate)?=.* has no effect without correction_bias=True"),
    ],
)
def test_what_it_does_not_go_with_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(QUANTILE, **fields)


def test_all_experts_for_every_token_are_refused():
    with pytest.raises(ConfigError, match=r"bias_update='quantile' needs top_k=8 to be less than num_experts=8"):
        dataclasses.replace(CONFIG, top_k=8)
