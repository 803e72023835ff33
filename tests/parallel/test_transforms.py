"""The layer on a mesh under jit, scan, remat and vmap; and its refusals there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_latent_moe import ConfigError, ParallelConfig, Precision, RouterConfig, latent_moe, param_shapes
from jax_latent_moe.device import Device
from jax_latent_moe.parallel import choice, param_specs
from tests import cases, layers
from tests.flax_layers import draw, fill
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close, assert_trees_close

LAYERS = 2
DENSE = dataclasses.replace(BASE, parallel=None)


def stack_loss(config, stacked, x):
    """Layers under scan and remat, with their losses."""

    @jax.checkpoint
    def block(x, params):
        y, aux = latent_moe(params, x, config)
        return x + y, sum(aux.losses.values())

    y, losses = jax.lax.scan(block, x, stacked)
    return jnp.sum(jnp.square(y)) + jnp.sum(losses)


def test_scan_of_remat_under_jit(rng):
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((LAYERS, *leaf.shape), leaf.dtype), param_shapes(BASE))
    stacked, x = fill(rng, stack), jnp.float32(rng.normal(size=(8, 2, 16)))
    gradient = jax.jit(jax.grad(stack_loss, (1, 2)), static_argnums=0)
    dparams, dx = gradient(DENSE, stacked, x)
    with jax.set_mesh(make_mesh(1, 2, 2, 2)):
        dparams_mesh, dx_mesh = gradient(BASE, stacked, x)
    assert_close(dx_mesh, dx, "float32")
    assert_trees_close(dparams_mesh, dparams, "float32")


def test_vmap(rng):
    params, x = draw(rng, BASE), jnp.float32(rng.normal(size=(3, 8, 2, 16)))
    over = jax.jit(jax.vmap(latent_moe, (None, 0, None)), static_argnums=2)
    y, aux = over(params, x, DENSE)
    with jax.set_mesh(make_mesh(2, 1, 2, 1)):
        y_mesh, aux_mesh = over(params, x, BASE)
    assert_close(y_mesh, y, "float32")
    np.testing.assert_array_equal(aux_mesh.tokens_per_expert, aux.tokens_per_expert)


def test_placed_parameters_stay_where_they_are(rng):
    """Gradients come out as the parameters went in, and no expert ever leaves its device."""
    mesh, config = make_mesh(1, 2, 4, 1), BASE
    specs = param_specs(config, mesh)
    placed = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    params = jax.device_put(draw(rng, config), placed)
    x = jnp.float32(rng.normal(size=(8, 2, 16)))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda params: latent_moe(params, x, config)[0].sum()))
        grads = gradient(params)
    del grads["router"]["bias"]  # it has none: zeros, wherever XLA puts them
    for part, leaves in grads.items():
        for name, leaf in leaves.items():
            assert leaf.sharding.is_equivalent_to(placed[part][name], leaf.ndim), f"{part}/{name}"
    assert {shard.data.shape for shard in grads["experts"]["w_in"].addressable_shards} == {(2, 4, 8)}


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((1, 1, 8, 1), {"num_experts": 6}, r"num_experts=6 must be a multiple of the mesh's expert=8"),
        ((1, 1, 1, 4), {"expert_intermediate_size": 6}, r"expert_intermediate_size=6 must be .* tensor=4"),
        ((1, 1, 1, 4), {"shared_expert_intermediate_size": 6}, r"shared_expert_intermediate_size=6 must .* tensor=4"),
        ((1, 4, 1, 1), {"hidden_size": 18}, r"hidden_size=18 must be a multiple of the mesh's fsdp=4"),
        ((1, 4, 1, 1), {"latent_size": 6}, r"latent_size=6 must be a multiple of the mesh's fsdp=4"),
    ],
)
def test_what_an_axis_does_not_divide_is_refused(sizes, changes, message):
    config = dataclasses.replace(BASE, **changes)
    x = jax.ShapeDtypeStruct((8, 2, config.hidden_size), jnp.float32)
    with jax.set_mesh(make_mesh(*sizes)), pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(latent_moe, config=config), param_shapes(config), x)


MODES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
ROUTERS = {
    "capacity": RouterConfig(capacity_factor=1.0, switch_loss_coef=0.1, sequence_loss_coef=0.1, global_loss_coef=0.1),
    "tiles": RouterConfig(round_to_tile=4, bias_update="quantile", per_expert_scale=True, z_loss_coef=0.1),
    "sinkhorn": RouterConfig(selection="sinkhorn", correction_bias=False, logit_bias=True),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_strict_promotion(monkeypatch, mode, router, dispatch):
    """These modes refuse operations while the layer is traced."""
    monkeypatch.setattr(choice, "current_device", lambda: Device("gpu", "NVIDIA H200"))
    parallel = dataclasses.replace(BASE.parallel, dispatch=dispatch, capacity_factor=1.5)
    config = dataclasses.replace(
        BASE, router=router, parallel=parallel, latent_norm="post", precision=Precision("fp8_block", "fp8_block")
    )

    def loss(params, x, mask):
        return jnp.sum(latent_moe(params, x, config, token_mask=mask)[0])

    x, mask = jax.ShapeDtypeStruct((8, 4, 16), "float32"), jax.ShapeDtypeStruct((8, 4), bool)
    with jax.set_mesh(make_mesh(1, 2, 2, 2)), mode():
        dparams, dx = jax.eval_shape(jax.grad(loss, (0, 1)), param_shapes(config), x, mask)
    assert jax.tree.map(lambda leaf: leaf.shape, dparams) == jax.tree.map(lambda leaf: leaf.shape, param_shapes(config))
    assert dx.shape == x.shape


@pytest.mark.parametrize("split", [P("data"), P(("data", "expert"))], ids=str)
def test_explicit_axes_are_left_to_xla(rng, split):
    """The default of jax.make_mesh: the result has the sharding of x."""
    config = dataclasses.replace(BASE, router=RouterConfig(sequence_loss_coef=0.1, capacity_factor=1.0))
    case = cases.random_inputs(rng, config, (4, 2), masked=True)
    mesh = jax.make_mesh((2, 2), ("data", "expert"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(value, NamedSharding(mesh, split)) for value in (np.float32(case.x), case.token_mask))
        y, aux = jax.jit(latent_moe, static_argnums=2)(layers.cast(case.params, "float32"), x, config, token_mask=mask)
    assert tuple(jax.typeof(y).sharding.spec)[:1] == tuple(split)
    expected = case.oracle()
    assert_close(y, expected.y, "float32")
    np.testing.assert_array_equal(aux.dropped_per_expert, expected.dropped_per_expert)
    with jax.set_mesh(mesh):
        layers.check_against_oracle(case)


def test_explicit_axes_without_x_on_the_mesh_are_refused():
    x, mesh = jax.ShapeDtypeStruct((4, 2, 16), jnp.float32), jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="Explicit, and x is not placed on the mesh: place it"):
        jax.eval_shape(functools.partial(latent_moe, config=BASE), param_shapes(BASE), x)


def test_manual_axes_are_refused(rng):
    case = cases.draw(rng, BASE, (4, 2))
    run = functools.partial(latent_moe, layers.cast(case.params, "float32"), case.x, BASE)
    inside = jax.shard_map(lambda: run()[0], in_specs=(), out_specs=jax.sharding.PartitionSpec(), check_vma=False)
    with jax.set_mesh(make_mesh(1, 1, 2, 1)), pytest.raises(ConfigError, match="leave parallel=None inside of a shard"):
        inside()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_axis": "data"}, "must differ"),
        ({"data_axis": ""}, "must be the name of a mesh axis"),
        ({"dispatch": "broadcast"}, "parallel.dispatch='broadcast' is unknown"),
        ({"capacity_factor": 0.0}, "parallel.capacity_factor=0.0 must be more than 0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "axis"),
    [
        ("data_axis", "rows", "rows"),
        ("fsdp_axis", "zero", "zero"),
        ("expert_axis", "experts", "experts"),
        ("tensor_axis", "model", "model"),
        ("sequence_axis", "context", "context"),
        ("dispatch", "all_to_all", "expert"),
        ("capacity_factor", 0.5, "expert"),
        ("dispatch_format", "fp8_block", "expert"),
    ],
)
def test_every_field_is_read(field, value, axis):
    """Changing it changes the program on a mesh with that axis."""
    config = dataclasses.replace(BASE, parallel=dataclasses.replace(ParallelConfig(), **{field: value}))
    x = jax.ShapeDtypeStruct((8, 4, 16), jnp.float32)
    with jax.set_mesh(make_mesh(2, names=(axis,))):
        trace = jax.make_jaxpr(latent_moe, static_argnums=2)
        programs = {str(trace(param_shapes(BASE), x, c)) for c in (BASE, config)}
    assert len(programs) == 2
    assert field in {f.name for f in dataclasses.fields(ParallelConfig)}
