"""nnx.LatentMoE holds the parameters of the functional layer, gives its outputs, and goes through every transform."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

from jax_latent_moe import InputError, init_params, latent_moe, linen, param_axes, param_shapes
from jax_latent_moe import nnx as moe
from jax_latent_moe import update_correction_bias as update_one
from tests.flax_layers import (
    CONFIGS,
    FULL,
    HALF,
    OTHER,
    SMALL,
    draw,
    fill,
    functional_gradients,
    inputs,
    mask_and_ids,
    objective,
)
from tests.tolerances import assert_close, assert_trees_close

SOWN = (moe.AuxiliaryLoss, nnx.Intermediate)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config, *, rngs):
        self.norm = nnx.RMSNorm(config.hidden_size, rngs=rngs)
        self.mlp = moe.LatentMoE(config, rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Model(nnx.Module):
    """Two layers of different sizes."""

    def __init__(self, *, rngs):
        self.blocks = nnx.List([Block(config, rngs=rngs) for config in (FULL, OTHER)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stack(nnx.Module):
    """Two rematerialised layers, stacked and scanned over."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make(rngs):
            return Block(SMALL, rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: "layers"})
        @nnx.remat
        def layer(block, x):
            return block(x)

        return layer(self.blocks, x)


def abstract(make):
    """The module with shapes in place of values."""
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def filled(rng, make):
    """The module with random values."""
    module = abstract(make)
    nnx.update(module, fill(rng, nnx.state(module)))
    return module


def layer(params, config):
    return moe.from_params(params, config)


@nnx.jit
def capture(module, x, **kwargs):
    y, losses, intermediates = nnx.capture(module, *SOWN)(x, **kwargs)
    return y, nnx.to_pure_dict(losses), nnx.to_pure_dict(intermediates)


def test_the_tree_is_the_functional_one_with_a_bias_of_its_own_type(config):
    module = abstract(lambda rngs: moe.LatentMoE(config, rngs=rngs))
    _, params, bias, rest = nnx.split(module, nnx.Param, moe.CorrectionBias, ...)
    assert not rest
    merged = nnx.to_pure_dict(nnx.merge_state(params, bias))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, param_shapes(config))
    assert set(nnx.to_flat_state(bias).paths) == ({("router", "bias")} if config.router.correction_bias else set())
    for leaf in jax.tree.leaves(bias):
        assert leaf.dtype == jnp.float32


def test_every_variable_carries_its_logical_axes(config):
    state = nnx.state(abstract(lambda rngs: moe.LatentMoE(config, rngs=rngs)))
    axes = {path: variable.get_metadata("out_sharding") for path, variable in nnx.to_flat_state(state)}
    assert axes == {(part, name): a for part, leaves in param_axes(config).items() for name, a in leaves.items()}


def test_one_key_draws_what_init_params_draws(rng):
    seed = int(rng.integers(2**31))
    module = nnx.jit(lambda: moe.LatentMoE(SMALL, rngs=nnx.Rngs(seed)))()
    params = jax.jit(init_params, static_argnums=1)(nnx.Rngs(seed).params(), SMALL)
    chex.assert_trees_all_equal(moe.to_params(module), params)


def test_conversions_are_exact_both_ways(rng, config):
    params = draw(rng, config)
    module = layer(params, config)
    chex.assert_trees_all_equal(moe.to_params(module), params)
    initial = abstract(lambda rngs: moe.LatentMoE(config, rngs=rngs))
    assert nnx.graphdef(module) == nnx.graphdef(initial)
    variables = linen.from_params(moe.to_params(module), config)
    chex.assert_trees_all_equal(moe.to_params(layer(linen.to_params(variables), config)), params)


def test_parameters_of_another_layer_are_refused(rng):
    with pytest.raises(InputError, match="must be of shape"):
        layer(draw(rng, OTHER), FULL)


@pytest.mark.parametrize(("config", "replay"), [(FULL, False), (FULL, True), (HALF, False)], ids=["", "replay", "half"])
def test_outputs_and_sown_values_are_those_of_the_function_and_of_linen(rng, config, replay):
    params, x = draw(rng, config), inputs(rng, config)
    kwargs = mask_and_ids(rng, config) if replay else {}
    y, losses, intermediates = capture(layer(params, config), x, **kwargs)
    expected, aux = jax.jit(latent_moe, static_argnums=2)(params, x, config, **kwargs)
    np.testing.assert_array_equal(y, expected)
    assert y.dtype == config.dtype
    chex.assert_trees_all_equal(losses, {name: (loss,) for name, loss in aux.losses.items()})
    arrays = {name: value for name, value in aux._asdict().items() if value is not None}
    del arrays["losses"]
    chex.assert_trees_all_equal(intermediates, {name: (value,) for name, value in arrays.items()})
    variables = linen.from_params(params, config)
    by_linen = jax.jit(lambda v, x, **kwargs: linen.LatentMoE(config).apply(v, x, mutable=True, **kwargs))
    np.testing.assert_array_equal(y, by_linen(variables, x, **kwargs)[0])


def test_nothing_is_sown_outside_of_capture(rng):
    module, x = layer(draw(rng, SMALL), SMALL), inputs(rng, SMALL)
    before = nnx.graphdef(module)
    jax.jit(lambda x: module(x))(x)  # also: a closed-over module is not written to
    assert nnx.graphdef(module) == before


def test_gradients_are_those_of_the_function(rng):
    params, x = draw(rng), inputs(rng)

    def loss(module):
        y, losses = nnx.capture(module, moe.AuxiliaryLoss)(x)
        return objective(y, losses)

    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(layer(params, FULL)))
    assert "bias" not in grads["router"]
    expected = functional_gradients(params, x)
    del expected["router"]["bias"]
    assert_trees_close(grads, expected, "float32")


def test_an_optimiser_moves_the_parameters_and_not_the_bias(rng):
    model, x = filled(rng, Model), inputs(rng)
    optimiser = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.1), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model))

    @nnx.jit
    def step(model, optimiser):
        def loss(model):
            y, losses, intermediates = nnx.capture(model, *SOWN)(x)
            return objective(y, losses), intermediates

        grads, intermediates = nnx.grad(loss, has_aux=True)(model)
        optimiser.update(model, grads)
        return intermediates

    intermediates = step(model, optimiser)
    chex.assert_trees_all_equal(nnx.state(model, moe.CorrectionBias), nnx.filter_state(before, moe.CorrectionBias))
    old, new = nnx.to_pure_dict(nnx.filter_state(before, nnx.Param)), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for leaf, moved in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert not np.array_equal(leaf, moved)

    moe.update_correction_bias(model, intermediates)
    for i, config in enumerate((FULL, OTHER)):
        bias = before["blocks"][i]["mlp"]["router"]["bias"][...]
        (counts,) = intermediates["blocks"][i]["mlp"]["tokens_per_expert"].get_value()
        expected = update_one(bias, counts, config.router.bias_update_rate)
        np.testing.assert_array_equal(model.blocks[i].mlp.router.bias[...], expected)
        assert not np.array_equal(expected, bias)


def test_a_missing_count_is_named(rng):
    with pytest.raises(InputError, match="blocks/0/mlp/tokens_per_expert"):
        moe.update_correction_bias(abstract(Model), nnx.State({}))


def test_scan_over_rematerialised_layers(rng):
    stack, x = filled(rng, Stack), inputs(rng, SMALL)
    assert stack.blocks.mlp.experts.w_in.get_metadata("out_sharding") == (
        "layers",
        *param_axes(SMALL)["experts"]["w_in"],
    )
    graphdef, state = nnx.split(stack.blocks)

    @nnx.jit
    @nnx.grad(has_aux=True)
    def by_scan(stack):
        y, losses, intermediates = nnx.capture(stack, *SOWN)(x)
        return objective(y, losses), (y, losses, intermediates)

    @jax.jit
    def by_loop(state):
        def loss(state):
            y, losses, counts = x, [], []
            for i in range(2):
                block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))  # noqa: B023 (called at once)
                y, sown, intermediates = nnx.capture(block, *SOWN)(y)
                losses.append(sown)
                counts.append(intermediates["mlp"]["tokens_per_expert"].get_value()[0])
            return objective(y, losses), (y, losses, jnp.stack(counts))

        return jax.grad(loss, has_aux=True)(state)

    grads, (y, losses, intermediates) = by_scan(stack)
    expected_grads, (expected, expected_losses, counts) = by_loop(state)
    assert_close(y, expected, "float32")
    (switch,) = losses["blocks"]["mlp"]["switch"].get_value()
    assert_close(switch, jnp.stack([sown["mlp"]["switch"].get_value()[0] for sown in expected_losses]), "float32")
    np.testing.assert_array_equal(intermediates["blocks"]["mlp"]["tokens_per_expert"].get_value()[0], counts)
    expected_grads = nnx.to_pure_dict(nnx.filter_state(expected_grads, nnx.Param))
    assert_trees_close(nnx.to_pure_dict(grads)["blocks"], expected_grads, "float32")

    bias = state["mlp"]["router"]["bias"][...]
    moe.update_correction_bias(stack, intermediates)
    expected_bias = jax.vmap(lambda bias, n: update_one(bias, n, SMALL.router.bias_update_rate))(bias, counts)
    np.testing.assert_array_equal(stack.blocks.mlp.router.bias[...], expected_bias)


def test_vmap_over_inputs(rng):
    module, x = layer(draw(rng, SMALL), SMALL), inputs(rng, SMALL, leading=(3, 2, 5))
    looped = jnp.stack([capture(module, x[i])[0] for i in range(3)])
    batched = nnx.jit(nnx.vmap(lambda module, x: module(x), in_axes=(None, 0)))
    assert_close(batched(module, x), looped, "float32")


def test_export_and_merge(rng):
    module, x = layer(draw(rng, SMALL), SMALL), inputs(rng, SMALL)
    graphdef, state = nnx.split(module)
    function = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    exported = export.export(function)(nnx.to_pure_dict(state), x)
    np.testing.assert_array_equal(exported.call(nnx.to_pure_dict(state), x), function(state, x))


def test_layers_of_different_sizes_in_one_model(rng):
    model = filled(rng, Model)
    for block, config in zip(model.blocks, (FULL, OTHER), strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(moe.to_params(block.mlp), param_shapes(config))
    x = inputs(rng)
    y, _, intermediates = capture(model, x)
    assert y.shape == x.shape
    assert intermediates["blocks"][1]["mlp"]["expert_ids"][0].shape == (2, 5, OTHER.top_k)


def test_one_trace_per_shape(rng):
    module, x = layer(draw(rng, SMALL), SMALL), inputs(rng, SMALL)
    traced = nnx.jit(chex.assert_max_traces(lambda module, x: nnx.capture(module, *SOWN)(x), n=1))
    for _ in range(3):
        traced(module, x)


def test_names_shard_on_a_mesh_with_rules_and_are_only_names_elsewhere(rng):
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [("expert", "x"), ("expert_latent", "y"), ("hidden", None), ("expert_intermediate", None)]

    def make():
        return moe.LatentMoE(SMALL, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        unruled = make()
        with nnx.logical_axis_rules(rules):
            ruled = make()
            specs = nnx.get_partition_spec(nnx.state(ruled))
    assert ruled.experts.w_in[...].sharding.spec == jax.P("x", "y", None)
    assert ruled.router.bias[...].sharding.spec == jax.P("x")
    assert specs["experts"]["w_in"].get_value() == jax.P("x", "y", None)
    assert unruled.experts.w_in[...].sharding.is_fully_replicated
    chex.assert_trees_all_equal(jax.device_get(moe.to_params(ruled)), jax.device_get(moe.to_params(unruled)))


def test_copies_and_pickles(rng):
    module, x = layer(draw(rng, HALF), HALF), inputs(rng, HALF)
    expected = capture(module, x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), nnx.clone(module)):
        chex.assert_trees_all_equal(capture(again, x), expected)


@pytest.mark.parametrize(
    "axis_names", [{}, {"hidden": "embed", "expert": "exp", "expert_intermediate": "mlp"}, None], ids=str
)
def test_rules_of_other_names_split_what_they_name(axis_names):
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nnx.logical_axis_rules([("embed", None), ("exp", "x"), ("mlp", "y")]):
        model = moe.LatentMoE(SMALL, rngs=nnx.Rngs(0), axis_names=axis_names)
        assert jax.jit(lambda m, x: m(x))(model, jnp.ones((2, SMALL.hidden_size))).shape == (2, SMALL.hidden_size)
    named = axis_names or {}
    spec = model.experts.w_out[...].sharding.spec if axis_names else ()
    assert tuple(spec)[:2] == (("x", "y") if named else ())


def test_what_is_no_module_or_state_is_refused():
    for rngs in (None, 0, jax.random.key(0)):
        with pytest.raises(InputError, match=r"rngs of type .* must be nnx\.Rngs, such as nnx\.Rngs"):
            moe.LatentMoE(SMALL, rngs=rngs)
    with pytest.raises(InputError, match="module of type NoneType must be a LatentMoE"):
        moe.to_params(None)
    for call in (moe.loads, lambda given: moe.update_correction_bias(None, given)):
        with pytest.raises(InputError, match=r"intermediates of type dict must be the nnx\.State"):
            call({})
