"""Both Flax modules on a mesh: placed by logical axis rules, equal to the function, saved and restored elsewhere."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import jax_latent_moe.linen
import jax_latent_moe.nnx
from jax_latent_moe import RouterConfig, latent_moe, param_axes
from jax_latent_moe.parallel import logical_axis_rules, param_specs
from tests.flax_layers import draw
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close, assert_trees_close

CONFIG = dataclasses.replace(BASE, router=RouterConfig(sequence_loss_coef=0.1))
ALONE = dataclasses.replace(CONFIG, parallel=None)


def drawn(rng):
    return draw(rng, CONFIG), jnp.float32(rng.normal(size=(8, 2, 16)))


def alone(params, x):
    """Gradients and loads on one device."""

    def loss(params):
        y, aux = latent_moe(params, x, ALONE)
        return jnp.sum(jnp.sin(y)) + sum(aux.losses.values()), aux.tokens_per_expert

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 1)])
def test_rules_place_parameters_as_the_layer_takes_them(sizes):
    mesh = make_mesh(*sizes)
    rules, specs = logical_axis_rules(CONFIG.parallel, mesh), param_specs(CONFIG, mesh)
    for part, leaves in param_axes(CONFIG).items():
        for name, axes in leaves.items():
            by_rules = NamedSharding(mesh, nn.logical_to_mesh_axes(axes, rules))
            assert by_rules.is_equivalent_to(NamedSharding(mesh, specs[part][name]), len(axes)), f"{part}/{name}"


def test_linen(rng):
    mesh, (params, x) = make_mesh(2, 1, 2, 2), drawn(rng)
    layer, variables = jax_latent_moe.linen.LatentMoE(CONFIG), jax_latent_moe.linen.from_params(params, CONFIG)
    specs = nn.get_partition_spec(variables)
    placed = nn.logical_to_mesh_sharding(specs, mesh, logical_axis_rules(CONFIG.parallel, mesh))
    variables = jax.device_put(nn.unbox(variables), placed)

    def loss(trained):
        y, sown = layer.apply(variables | {"params": trained}, x, mutable=["losses", "intermediates"])
        losses, loads = sown["losses"], sown["intermediates"]["tokens_per_expert"][0]
        return jnp.sum(jnp.sin(y)) + sum(jax.tree.leaves(losses)), loads

    with jax.set_mesh(mesh):
        grads, loads = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    wanted, wanted_loads = alone(params, x)
    del wanted["router"]["bias"]
    assert_trees_close(grads, wanted, "float32")
    np.testing.assert_array_equal(loads, wanted_loads)
    assert len(variables["params"]["experts"]["w_in"].sharding.device_set) == 8


def test_nnx(rng):
    mesh, (params, x) = make_mesh(1, 2, 2, 2), drawn(rng)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(logical_axis_rules(CONFIG.parallel, mesh)):
        born = jax_latent_moe.nnx.LatentMoE(CONFIG, rngs=nnx.Rngs(0))
        assert born.experts["w_in"][...].sharding.shard_shape((8, 8, 8)) == (4, 4, 4)
        model = jax_latent_moe.nnx.from_params(params, CONFIG)

        @nnx.jit
        def gradient(model):
            def loss(model):
                y, losses, _ = nnx.capture(model, jax_latent_moe.nnx.AuxiliaryLoss, nnx.Intermediate)(x)
                return jnp.sum(jnp.sin(y)) + sum(jax.tree.leaves(losses))

            return nnx.grad(loss)(model)

        grads = nnx.to_pure_dict(gradient(model))
    wanted, _ = alone(params, x)
    del wanted["router"]["bias"]
    assert_trees_close({part: dict(leaves) for part, leaves in grads.items()}, wanted, "float32")


def test_a_checkpoint_is_restored_onto_another_mesh(rng, tmp_path):
    """Eight devices to four with another split of the experts, to one, and back: the same bits and the same output."""
    params, x = drawn(rng)
    layer = jax.jit(latent_moe, static_argnums=2)
    wanted = layer(params, x, ALONE)[0]

    def on(mesh):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(CONFIG, mesh))

    held = jax.device_put(params, on(make_mesh(2, 1, 4, 1)))
    for i, sizes in enumerate([(1, 2, 2, 2), (1, 1, 1, 1), (1, 1, 8, 1)]):
        path, mesh = tmp_path / str(i), make_mesh(*sizes)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, held)
            checkpointer.wait_until_finished()
            shapes = jax.tree.map(
                lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), held, on(mesh)
            )
            held = checkpointer.restore(path, shapes)
        jax.tree.map(np.testing.assert_array_equal, held, params)
        with jax.set_mesh(mesh):
            assert_close(layer(held, x, CONFIG)[0], wanted, "float32")
