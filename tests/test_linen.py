"""linen.LatentMoE holds the parameters of the functional layer, gives its outputs, and goes through every transform."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict
from jax import export

from jax_latent_moe import InputError, init_params, latent_moe, linen, param_axes, param_shapes
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

LAYERED = {"params": 0, "correction_bias": 0, "losses": 0, "intermediates": 0}
SOWN = ["losses", "intermediates"]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


class Block(nn.Module):
    """Pre-norm residual block; carries for nn.scan."""

    config: object

    @nn.compact
    def __call__(self, x, _=None):
        return x + linen.LatentMoE(self.config, name="mlp")(nn.RMSNorm()(x)), None


class Model(nn.Module):
    """Two layers of different sizes."""

    @nn.compact
    def __call__(self, x):
        for config in (FULL, OTHER):
            x, _ = Block(config)(x)
        return x


def shapes(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, x, **kwargs):
    return module.apply(variables, x, mutable=SOWN, **kwargs)


def test_variables_are_the_functional_tree_with_the_bias_apart(rng, config):
    variables = shapes(linen.LatentMoE(config), inputs(rng, config))
    assert set(variables) == {"params"} | ({"correction_bias"} if config.router.correction_bias else set())
    assert "bias" not in variables["params"]["router"]
    chex.assert_trees_all_equal_shapes_and_dtypes(linen.to_params(variables), param_shapes(config))
    if config.router.correction_bias:
        assert variables["correction_bias"]["router"]["bias"].value.dtype == jnp.float32


def test_every_variable_carries_its_logical_axes(rng, config):
    specs = linen.to_params(nn.get_partition_spec(shapes(linen.LatentMoE(config), inputs(rng, config))))
    assert {part: {name: tuple(spec) for name, spec in leaves.items()} for part, leaves in specs.items()} == param_axes(
        config
    )


def test_one_key_draws_what_init_params_draws(rng):
    module = linen.LatentMoE(SMALL)
    key = jax.random.key(rng.integers(2**31))
    layer_key = nn.apply(lambda m: m.make_rng("params"), module)({}, rngs={"params": key})
    variables = jax.jit(module.init)(key, inputs(rng, SMALL))
    chex.assert_trees_all_equal(linen.to_params(variables), jax.jit(init_params, static_argnums=1)(layer_key, SMALL))


def test_layers_of_one_model_draw_different_values(rng):
    model = nn.Sequential([linen.LatentMoE(SMALL), linen.LatentMoE(SMALL)])
    params = jax.jit(model.init)(jax.random.key(0), inputs(rng))["params"]
    first, second = (params[f"layers_{i}"]["router"]["kernel"].value for i in (0, 1))
    assert not np.array_equal(first, second)


def test_conversions_are_exact_both_ways(rng, config):
    params = draw(rng, config)
    variables = linen.from_params(params, config)
    chex.assert_trees_all_equal(linen.to_params(variables), params)
    initial = shapes(linen.LatentMoE(config), inputs(rng, config))
    assert jax.tree.structure(variables) == jax.tree.structure(initial)
    chex.assert_trees_all_equal(linen.to_params(FrozenDict(nn.unbox(variables))), params)


def test_parameters_of_another_layer_are_refused(rng):
    with pytest.raises(InputError, match="must be of shape"):
        linen.from_params(draw(rng, OTHER), FULL)


@pytest.mark.parametrize(("config", "replay"), [(FULL, False), (FULL, True), (HALF, False)], ids=["", "replay", "half"])
def test_outputs_and_sown_values_are_those_of_the_function(rng, config, replay):
    params, x = draw(rng, config), inputs(rng, config)
    kwargs = mask_and_ids(rng, config) if replay else {}
    y, sown = apply(linen.LatentMoE(config), linen.from_params(params, config), x, **kwargs)
    expected, aux = jax.jit(latent_moe, static_argnums=2)(params, x, config, **kwargs)
    np.testing.assert_array_equal(y, expected)
    assert y.dtype == config.dtype
    chex.assert_trees_all_equal(sown["losses"], {name: (loss,) for name, loss in aux.losses.items()})
    arrays = {name: value for name, value in aux._asdict().items() if value is not None}
    del arrays["losses"]
    chex.assert_trees_all_equal(sown["intermediates"], {name: (value,) for name, value in arrays.items()})


def test_unboxed_and_boxed_variables_give_the_same(rng):
    variables, x = linen.from_params(draw(rng, SMALL), SMALL), inputs(rng, SMALL)
    module = linen.LatentMoE(SMALL)
    chex.assert_trees_all_equal(apply(module, variables, x), apply(module, nn.unbox(variables), x))


def test_nothing_is_sown_unasked(rng):
    module, x = linen.LatentMoE(FULL), inputs(rng)
    variables = shapes(module, x)
    assert not {"losses", "intermediates"} & set(variables)
    assert jax.eval_shape(module.apply, variables, x).shape == x.shape


def test_gradients_are_those_of_the_function(rng):
    params, x = draw(rng), inputs(rng)

    def loss(variables):
        y, sown = linen.LatentMoE(FULL).apply(variables, x, mutable=SOWN)
        return objective(y, sown["losses"])

    grads = linen.to_params(jax.jit(jax.grad(loss))(linen.from_params(params, FULL)))
    np.testing.assert_array_equal(grads["router"]["bias"], 0)
    assert all(np.any(leaf) for path, leaf in jax.tree.leaves_with_path(grads) if path[-1].key != "bias")
    assert_trees_close(grads, functional_gradients(params, x), "float32")


def test_an_optimiser_moves_the_parameters_and_not_the_bias(rng):
    model, x = Model(), inputs(rng)
    variables = fill(rng, shapes(model, x))
    optimiser = optax.adamw(0.1, weight_decay=0.1)

    @jax.jit
    def step(variables):
        def loss(params):
            y, sown = model.apply(variables | {"params": params}, x, mutable=SOWN)
            return objective(y, sown["losses"]), sown["intermediates"]

        grads, sown = jax.grad(loss, has_aux=True)(variables["params"])
        state = optimiser.init(variables["params"])
        updates, _ = optimiser.update(grads, state, variables["params"])
        return variables | {"params": optax.apply_updates(variables["params"], updates)}, sown

    after, sown = step(variables)
    chex.assert_trees_all_equal(after["correction_bias"], variables["correction_bias"])
    for before, now in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(after["params"]), strict=True):
        assert not np.array_equal(before, now)

    bias = linen.update_correction_bias(variables["correction_bias"], sown, 0.25)
    assert jax.tree.structure(bias) == jax.tree.structure(variables["correction_bias"])
    for block in ("Block_0", "Block_1"):
        old, new = (nn.unbox(tree)[block]["mlp"]["router"]["bias"] for tree in (variables["correction_bias"], bias))
        (counts,) = sown[block]["mlp"]["tokens_per_expert"]
        np.testing.assert_array_equal(new, update_one(old, counts, 0.25))
        assert not np.array_equal(new, old)


def test_counts_of_several_calls_are_added(rng):
    first, second = (jnp.asarray(counts, jnp.int32) for counts in ([9, 0, 0], [0, 8, 1]))
    bias = linen.update_correction_bias(
        {"router": {"bias": jnp.zeros(3)}}, {"tokens_per_expert": (first, second)}, rate=0.5
    )
    np.testing.assert_array_equal(bias["router"]["bias"], [-0.5, -0.5, 0.5])


def test_a_missing_count_is_named(rng):
    with pytest.raises(InputError, match="mlp/tokens_per_expert"):
        linen.update_correction_bias({"mlp": {"router": {"bias": jnp.zeros(3)}}}, {}, rate=0.5)


def test_scan_over_rematerialised_layers(rng):
    layers, x = 2, inputs(rng)
    scanned = nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes=LAYERED,
        split_rngs={"params": True},
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(SMALL)
    variables = fill(rng, shapes(scanned, x))
    assert variables["params"]["mlp"]["experts"]["w_in"].names[:2] == ("layers", "expert")
    assert variables["correction_bias"]["mlp"]["router"]["bias"].names == ("layers", "expert")

    def by_scan(variables):
        (y, _), sown = scanned.apply(variables, x, mutable=SOWN)
        return objective(y, sown["losses"]), (y, sown)

    def by_loop(variables):
        y, losses, counts = x, [], []
        for i in range(layers):
            layer = jax.tree.map(lambda leaf: leaf[i], nn.unbox(variables))  # noqa: B023 (called at once)
            (y, _), sown = Block(SMALL).apply(layer, y, mutable=SOWN)
            losses.append(sown["losses"])
            counts.append(sown["intermediates"]["mlp"]["tokens_per_expert"][0])
        return objective(y, losses), (y, losses, jnp.stack(counts))

    grads, (y, sown) = jax.jit(jax.grad(by_scan, has_aux=True))(variables)
    expected_grads, (expected, losses, counts) = jax.jit(jax.grad(by_loop, has_aux=True))(variables)
    assert_close(y, expected, "float32")
    expected_loss = jnp.stack([layer["mlp"]["switch"][0] for layer in losses])
    assert_close(sown["losses"]["mlp"]["switch"][0], expected_loss, "float32")
    np.testing.assert_array_equal(sown["intermediates"]["mlp"]["tokens_per_expert"][0], counts)
    assert_trees_close(nn.unbox(grads), nn.unbox(expected_grads), "float32")

    stacked = linen.update_correction_bias(variables["correction_bias"], sown["intermediates"], 0.25)
    old, new = (nn.unbox(tree)["mlp"]["router"]["bias"] for tree in (variables["correction_bias"], stacked))
    np.testing.assert_array_equal(new, jax.vmap(lambda bias, n: update_one(bias, n, 0.25))(old, counts))


@pytest.mark.parametrize("axis_names", [FrozenDict(), None, {"hidden": "embed", "expert": None}], ids=str)
@pytest.mark.parametrize("transform", [nn.scan, nn.vmap])
def test_plain_transforms_add_an_axis_without_a_name(rng, axis_names, transform):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = linen.LatentMoE(SMALL, axis_names=axis_names, name="mlp")(x)
            return (x + y, None) if transform is nn.scan else y

    length = {"length": 2} if transform is nn.scan else {"axis_size": 2, "in_axes": (None, None)}
    stack = transform(Layer, variable_axes={"params": 0, "correction_bias": 0}, split_rngs={"params": True}, **length)()
    x = inputs(rng, SMALL)
    variables = jax.jit(stack.init)(jax.random.key(0), x, None)
    out = jax.jit(stack.apply)(variables, x, None)
    boxed = variables["params"]["mlp"]["router"]["kernel"]
    if axis_names is not None:
        assert boxed.names == ((None, "embed", None) if axis_names else (None, "hidden", "expert"))
    layers = [jax.tree.map(lambda leaf: leaf[i], linen.to_params(variables)["mlp"]) for i in range(2)]  # noqa: B023
    if transform is nn.scan:
        for layer in layers:
            x = x + latent_moe(layer, x, SMALL)[0]
        assert_close(out[0], x, "float32")
    else:
        assert_close(out, jnp.stack([latent_moe(layer, x, SMALL)[0] for layer in layers]), "float32")


def test_an_axis_that_no_layer_has_cannot_be_renamed():
    for wrong in ("hidden", ["hidden"], {"hidden": 3}):
        with pytest.raises(InputError, match=r"axis_names=.* must map names to names"):
            linen.from_params(init_params(jax.random.key(0), SMALL), SMALL, wrong)
    with pytest.raises(InputError, match="axis_names rename 'embed', which is not one of 'hidden', 'latent'"):
        param_axes(SMALL, {"embed": "hidden"})


def test_vmap_over_inputs_and_over_layers(rng):
    module, x = linen.LatentMoE(SMALL), inputs(rng, leading=(4, 2, 5))
    variables = fill(rng, shapes(module, x[0]))
    looped = jnp.stack([apply(module, variables, x[i])[0] for i in range(4)])
    assert_close(jax.jit(jax.vmap(module.apply, (None, 0)))(variables, x), looped, "float32")

    ensemble = nn.vmap(
        linen.LatentMoE,
        variable_axes=LAYERED,
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "members"},
    )(SMALL)
    variables = fill(rng, shapes(ensemble, x))
    y, sown = apply(ensemble, variables, x)
    assert sown["losses"]["z"][0].shape == (4,)
    members = [jax.tree.map(lambda leaf: leaf[i], nn.unbox(variables)) for i in range(4)]  # noqa: B023
    assert_close(y, jnp.stack([apply(module, members[i], x[i])[0] for i in range(4)]), "float32")


def test_export(rng):
    module, x = linen.LatentMoE(SMALL), inputs(rng)
    variables = nn.unbox(fill(rng, shapes(module, x)))
    function = jax.jit(lambda variables, x: module.apply(variables, x, mutable=SOWN))
    exported = export.export(function)(variables, x)
    chex.assert_trees_all_equal(exported.call(variables, x), function(variables, x))


def test_layers_of_different_sizes_in_one_model(rng):
    x = inputs(rng)
    variables = fill(rng, shapes(Model(), x))
    params = linen.to_params(variables)
    for block, config in (("Block_0", FULL), ("Block_1", OTHER)):
        chex.assert_trees_all_equal_shapes_and_dtypes(params[block]["mlp"], param_shapes(config))
    y, sown = apply(Model(), variables, x)
    assert y.shape == x.shape
    assert sown["intermediates"]["Block_1"]["mlp"]["expert_ids"][0].shape == (2, 5, OTHER.top_k)


def test_one_trace_per_shape(rng):
    module, x = linen.LatentMoE(SMALL), inputs(rng)
    variables = fill(rng, shapes(module, x))
    traced = jax.jit(chex.assert_max_traces(lambda variables, x: module.apply(variables, x), n=1))
    for _ in range(3):
        traced(variables, x)


def test_names_shard_on_a_mesh(rng):
    module, x = linen.LatentMoE(SMALL), inputs(rng)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [("expert", "x"), ("expert_latent", "y")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), x))
        shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
        variables = jax.jit(module.init, out_shardings=shardings)(jax.random.key(0), x)
        y, _ = jax.jit(lambda variables, x: module.apply(variables, x, mutable=SOWN))(variables, x)
    assert variables["params"]["experts"]["w_in"].value.sharding.spec == jax.P("x", "y", None)
    assert variables["correction_bias"]["router"]["bias"].value.sharding.spec == jax.P("x")
    np.testing.assert_array_equal(y, apply(module, jax.device_get(variables), x)[0])


def test_variables_and_module_pickle(rng):
    module, x = linen.LatentMoE(HALF), inputs(rng, HALF)
    variables = fill(rng, shapes(module, x))
    module_again, variables_again = pickle.loads(pickle.dumps((module, variables)))
    chex.assert_trees_all_equal(apply(module_again, variables_again, x), apply(module, variables, x))


def test_what_is_no_collection_is_refused():
    for call in (linen.total_loss, linen.loads, lambda sown: linen.after_step({}, sown, 0.1)):
        with pytest.raises(InputError, match="sown of type NoneType must be a mapping of collections"):
            call(None)
    with pytest.raises(InputError, match="variables of type NoneType must be a mapping of collections"):
        linen.to_params(None)
    with pytest.raises(InputError, match="config of type NoneType must be a LatentMoEConfig"):
        linen.LatentMoE(None).init(jax.random.key(0), np.ones((2, 4), np.float32))
