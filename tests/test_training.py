"""The parts of a training step beside the layer: the split of the biases, the total loss, the biases' update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import P

import jax_latent_moe.linen
import jax_latent_moe.nnx
from jax_latent_moe import (
    InputError,
    NotCollectedWarning,
    RouterConfig,
    after_step,
    init_params,
    latent_moe,
    merge_state,
    split_state,
    total_loss,
    trainable_mask,
)
from tests import oracle
from tests.cases import TOY

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOSSES = RouterConfig(switch_loss_coef=0.1, sequence_loss_coef=0.2, z_loss_coef=0.3)
CONFIG = dataclasses.replace(TOY, router=LOSSES)
BIASLESS = dataclasses.replace(TOY, router=RouterConfig(correction_bias=False))
RATE = 0.25
jitted = jax.jit(latent_moe, static_argnums=2)
initial = functools.cache(lambda config, seed: jax.jit(init_params, static_argnums=1)(jax.random.key(seed), config))


def params_of(config, seed=0):
    return jax.tree.map(lambda leaf: leaf, initial(config, seed))  # dictionaries of its own


def tokens(rng, *leading):
    return jnp.float32(rng.normal(size=(*leading, TOY.hidden_size)))


def moved(bias, *counts):
    return oracle.update_correction_bias(np.asarray(bias), np.sum([np.asarray(c) for c in counts], axis=0), RATE)


MODELS = {
    "layer": lambda: params_of(CONFIG),
    "nested": lambda: {"head": jnp.ones(3), "blocks": {"a": {"moe": params_of(CONFIG)}, "b": {"mlp": jnp.ones(2)}}},
    "list": lambda: [params_of(CONFIG), params_of(BIASLESS), {"router": {"kernel": jnp.ones(2)}}],
    "tuple of none": lambda: (jnp.ones(2), {"w": jnp.ones(1)}),
    "no bias": lambda: params_of(BIASLESS),
    "empty": lambda: {},
}


@pytest.mark.parametrize("model", MODELS)
def test_split_and_merge_are_inverse(model):
    params = MODELS[model]()
    trainable, state = split_state(params)
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1] == jax.tree_util.DictKey("bias")]
    assert len(jax.tree.leaves(state)) == len(biases)
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(params)) - len(biases)
    assert jax.tree.structure(merge_state(trainable, state)) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merge_state(trainable, state), params)


@pytest.mark.parametrize("way", ["split", "masked", "haiku"])
def test_weight_decay_leaves_the_bias_alone(rng, way):
    params = params_of(CONFIG)
    params["router"]["bias"] = jnp.float32(rng.normal(size=8))
    x, optimiser = tokens(rng, 6), optax.adamw(0.1, weight_decay=0.1)

    def loss(trained, state):
        y, aux = latent_moe(merge_state(trained, state), x, CONFIG)
        return jnp.sum(y**2) + total_loss(aux)

    if way == "split":
        trained, state = split_state(params)
        gradients = jax.jit(jax.grad(loss))(trained, state)
        updates, _ = jax.jit(optimiser.update)(gradients, optimiser.init(trained), trained)
        after = merge_state(optax.apply_updates(trained, updates), state)
    else:
        optimiser = optax.masked(optimiser, trainable_mask)
        grads = jax.jit(jax.grad(loss))(params, {})
        if way == "haiku":
            params, grads = ({f"moe/{part}": leaves for part, leaves in tree.items()} for tree in (params, grads))
        updates, _ = jax.jit(optimiser.update)(grads, optimiser.init(params), params)
        after = optax.apply_updates(params, updates)
    for path, leaf in jax.tree.leaves_with_path(after):
        before = params
        for key in path:
            before = before[key.key]
        assert np.array_equal(leaf, before) == (path[-1].key == "bias"), path


def test_parameters_without_their_state_are_refused_with_the_way_out(rng):
    with pytest.raises(InputError, match=r"missing router/bias. merge_state\(trainable, state\) restores it"):
        latent_moe(split_state(params_of(CONFIG))[0], tokens(rng, 2), CONFIG)


def test_total_loss_is_one_number_for_every_config(rng):
    x = tokens(rng, 2, 3)
    for config in (CONFIG, BIASLESS, TOY):
        params = params_of(config)
        _, aux = jitted(params, x, config)
        expected = float(sum(aux.losses.values()))
        assert float(total_loss(aux)) == pytest.approx(expected)
        assert float(total_loss({"a": aux, "b": [aux, aux]})) == pytest.approx(3 * expected)
        stacked = jax.lax.map(lambda x, p=params, c=config: latent_moe(p, x, c)[1], x[None].repeat(3, 0))
        assert total_loss(stacked).shape == ()
        assert float(total_loss(stacked)) == pytest.approx(3 * expected, rel=1e-6)
    with pytest.raises(InputError, match="must hold LatentMoEAux values"):
        total_loss(aux.losses)


def test_after_step_adds_up_microbatches_layers_and_devices(rng):
    config, x = CONFIG, tokens(rng, 8, 3)
    params = {"a": params_of(config), "dense": {"w": jnp.ones(2)}, "b": [params_of(config, 1), params_of(BIASLESS)]}
    _, state = split_state(params)

    def auxes(x):
        return {
            "a": jitted(params["a"], x, config)[1],
            "b": [jitted(params["b"][0], x, config)[1], jitted(params["b"][1], x, BIASLESS)[1]],
        }

    whole = auxes(x)
    counts = [whole["a"].tokens_per_expert, whole["b"][0].tokens_per_expert]

    def check(after):
        for new, old, count in zip(jax.tree.leaves(after), jax.tree.leaves(state), counts, strict=True):
            np.testing.assert_array_equal(new, moved(old, count))
        assert jax.tree.structure(after) == jax.tree.structure(state)

    check(after_step(state, whole, RATE))
    first, second = auxes(x[:4]), auxes(x[4:])
    parts = {"a": [first["a"], second["a"].tokens_per_expert], "b": [(first["b"][0], second["b"][0]), None]}
    check(after_step(state, parts, RATE))
    check(after_step(state, jax.lax.map(auxes, x.reshape(4, 2, 3, -1)), RATE))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    step = jax.shard_map(
        lambda x: after_step(state, auxes(x), RATE, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P()
    )
    check(jax.jit(step)(x))
    recentred = after_step(state, whole, RATE, recentre=True)["a"]["router"]["bias"]
    expected = moved(state["a"]["router"]["bias"], counts[0])
    np.testing.assert_allclose(recentred, expected - expected.mean(), atol=1e-7)
    assert after_step({}, whole, RATE) == {}
    with pytest.raises(InputError, match="nothing at b"):
        after_step(state, {"a": whole["a"]}, RATE)


def test_after_step_of_stacked_layers(rng):
    params = jax.jit(jax.vmap(lambda key: init_params(key, CONFIG)))(jax.random.split(jax.random.key(0), 3))
    _, state = split_state(params)
    _, auxes = jax.lax.scan(lambda x, p: (x, latent_moe(p, x, CONFIG)[1]), tokens(rng, 5), params)
    bias = after_step(state, auxes, RATE)["router"]["bias"]
    for old, new, count in zip(state["router"]["bias"], bias, auxes.tokens_per_expert, strict=True):
        np.testing.assert_array_equal(new, moved(old, count))


def test_a_bias_moves_once_a_step_of_accumulated_gradients(rng):
    """optax.MultiSteps: loads of the micro-steps add up, and a rate of 0 in between leaves the bias."""
    trained, state = split_state(params_of(CONFIG))
    optimiser, x = optax.MultiSteps(optax.sgd(0.0), 3), tokens(rng, 6, 4)
    update = jax.jit(optimiser.update)
    opt_state, pending = optimiser.init(trained), jnp.zeros(8, jnp.int32)
    biases, counts = [], []
    for i in range(6):
        _, aux = jitted(merge_state(trained, state), x[i], CONFIG)
        _, opt_state = update(trained, opt_state, trained)
        done = optimiser.has_updated(opt_state)
        pending += aux.tokens_per_expert
        state = after_step(state, pending, jnp.where(done, RATE, 0.0))
        pending = jnp.where(done, 0, pending)
        biases.append(state["router"]["bias"])
        counts.append(aux.tokens_per_expert)
    np.testing.assert_array_equal(biases[1], np.zeros(8))
    np.testing.assert_array_equal(biases[2], moved(np.zeros(8), *counts[:3]))
    np.testing.assert_array_equal(biases[5], moved(biases[4], *counts[3:]))


@pytest.mark.parametrize("config", [CONFIG, BIASLESS, TOY], ids=["losses", "no bias", "bias alone"])
def test_linen_step(rng, config):
    x, layer = tokens(rng, 2, 3), jax_latent_moe.linen.LatentMoE(config)
    variables = jax_latent_moe.linen.from_params(params_of(config), config)
    _, sown = layer.apply(variables, x, mutable=["losses", "intermediates"])
    _, aux = latent_moe(params_of(config), x, config)  # without jit as well: the losses are equal to the bit
    assert float(jax_latent_moe.linen.total_loss(sown)) == float(total_loss(aux))
    after = jax_latent_moe.linen.after_step(variables, sown, RATE)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    two = jax.tree.map(jnp.add, *2 * [jax_latent_moe.linen.loads(sown)])
    again = jax_latent_moe.linen.after_step(variables, two, RATE)
    jax.tree.map(np.testing.assert_array_equal, again, after)
    if config.router.correction_bias:
        bias = nn.unbox(after)["correction_bias"]["router"]["bias"]
        np.testing.assert_array_equal(bias, moved(np.zeros(8), aux.tokens_per_expert))
        with pytest.raises(InputError, match="mutable"):
            jax_latent_moe.linen.after_step(variables, {}, RATE)
    with pytest.raises(InputError, match="lack 'losses'"):
        jax_latent_moe.linen.total_loss({"intermediates": {}})


@pytest.mark.parametrize("config", [CONFIG, BIASLESS, TOY], ids=["losses", "no bias", "bias alone"])
def test_nnx_step(rng, config):
    x, model = tokens(rng, 2, 3), jax_latent_moe.nnx.from_params(params_of(config), config)
    _, losses, sown = nnx.capture(model, jax_latent_moe.nnx.AuxiliaryLoss, nnx.Intermediate)(x)
    _, aux = latent_moe(params_of(config), x, config)  # without jit as well: the losses are equal to the bit
    assert float(jax_latent_moe.nnx.total_loss(losses)) == float(total_loss(aux))
    jax_latent_moe.nnx.update_correction_bias(model, jax_latent_moe.nnx.loads(sown), RATE)
    if config.router.correction_bias:
        np.testing.assert_array_equal(model.router["bias"][...], moved(np.zeros(8), aux.tokens_per_expert))
    with pytest.raises(InputError, match="no AuxiliaryLoss"):
        jax_latent_moe.nnx.total_loss(nnx.State({}))


@pytest.mark.parametrize(
    ("transform", "evaluate"),
    [
        (lambda f: f, lambda f, *arguments: f(*arguments)),
        (jax.jit, jax.eval_shape),  # tracing warns
        (jax.checkpoint, jax.eval_shape),
    ],
    ids=["plain", "jit", "remat"],
)
@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_a_layer_that_trains_uncollected_warns(rng, flax, transform, evaluate):
    """Differentiated it warns; evaluated, or with nothing to collect, it does not."""
    x, params = tokens(rng, 4), params_of(CONFIG)

    def run(config, params, x):
        if flax == "nnx":
            return jax_latent_moe.nnx.from_params(params, config)(x)
        return jax_latent_moe.linen.LatentMoE(config).apply(jax_latent_moe.linen.from_params(params, config), x)

    def gradient(config):
        return jax.grad(transform(lambda p: jnp.sum(run(config, p, x))))

    evaluate(functools.partial(run, CONFIG), params, x)
    with pytest.warns(NotCollectedWarning, match="router.bias_update_rate to 0"):
        evaluate(gradient(CONFIG), params)
    still = dataclasses.replace(TOY, router=RouterConfig(bias_update_rate=0.0))
    jax.eval_shape(gradient(still), params)
    jax.eval_shape(gradient(BIASLESS), params_of(BIASLESS))


def test_collected_gradients_do_not_warn(rng):
    x, layer = tokens(rng, 4), jax_latent_moe.linen.LatentMoE(CONFIG)

    def loss(variables):
        y, sown = layer.apply(variables, x, mutable=["losses", "intermediates"])
        return jnp.sum(y) + jax_latent_moe.linen.total_loss(sown)

    jax.eval_shape(jax.grad(loss), jax_latent_moe.linen.from_params(params_of(CONFIG), CONFIG))


@pytest.mark.parametrize(
    ("captured", "lost"),
    [((nnx.Intermediate,), "auxiliary losses"), ((jax_latent_moe.nnx.AuxiliaryLoss,), "expert loads")],
    ids=["losses lost", "loads lost"],
)
def test_what_nnx_captures_in_part_warns(rng, captured, lost):
    """As in linen, each of the two is missed by itself."""
    config = dataclasses.replace(CONFIG, router=RouterConfig(switch_loss_coef=0.1))
    x, model = tokens(rng, 4), jax_latent_moe.nnx.from_params(params_of(config), config)
    with pytest.warns(NotCollectedWarning, match=f"^The {lost} of a LatentMoE are not collected"):
        nnx.grad(lambda model: jnp.sum(nnx.capture(model, *captured)(x)[0]))(model)


def test_what_nnx_captures_whole_does_not_warn(rng):
    config = dataclasses.replace(CONFIG, router=RouterConfig(switch_loss_coef=0.1))
    x, model = tokens(rng, 4), jax_latent_moe.nnx.from_params(params_of(config), config)
    both = jax_latent_moe.nnx.AuxiliaryLoss, nnx.Intermediate
    nnx.grad(lambda model: jnp.sum(nnx.capture(model, *both)(x)[0]))(model)
