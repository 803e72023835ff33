"""Layers whose experts are codes, on meshes: split by experts, gathered over fsdp, split by inner widths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_latent_moe import ConfigError, latent_moe, lora, merge_state, param_shapes, quantize, split_state
from jax_latent_moe.formats import FORMATS
from jax_latent_moe.parallel import param_specs
from tests.flax_layers import draw
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close, assert_trees_close

CONFIG = dataclasses.replace(BASE, latent_size=64, expert_intermediate_size=64, activation="swiglu")
ALONE = dataclasses.replace(CONFIG, parallel=None)


def gradients(config, params, x):
    """Output, and gradients of everything but the codes."""
    trainable, state = split_state(params)
    dy = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def loss(trainable, state, x):
        y = latent_moe(merge_state(trainable, state), x, config)[0]
        return jnp.sum(y * dy), y

    run = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
    (_, y), grads = run(trainable, state, x)
    return y, grads


def placed(params, config, mesh):
    return jax.device_put(
        params,
        jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            param_specs(config, mesh, params),
            is_leaf=lambda node: isinstance(node, P),
        ),
    )


@pytest.mark.parametrize(("name", "sizes"), [("nvfp4", (1, 2, 2, 2)), ("fp8_block", (2, 1, 4, 1))])
def test_the_same_as_on_one_device(name, sizes, rng):
    params, x = quantize(draw(rng, ALONE), ALONE, name), jnp.float32(rng.normal(size=(8, 2, 16)))
    wanted, (wanted_params, wanted_x) = gradients(ALONE, params, x)
    mesh = make_mesh(*sizes)
    held = placed(params, CONFIG, mesh)
    codes = held["experts"]["w_in"].codes
    assert codes.shape == (8, 2, 64, 64 // (2 if name == "nvfp4" else 1))
    shard = codes.addressable_shards[0].data.shape
    assert shard == (8 // sizes[2], 2, 64 // sizes[3], codes.shape[3] // sizes[1])
    with jax.set_mesh(mesh):
        y, (dparams, dx) = gradients(CONFIG, held, x)
    assert_close(y, wanted, "float32")
    assert_close(dx, wanted_x, "float32")
    assert_trees_close(jax.tree.map(np.asarray, dparams), wanted_params, "float32")


def test_adapters_on_a_mesh(rng):
    """Their arrays are split as the weights are, and every gradient is that of one device."""
    key = jax.random.key(int(rng.integers(2**31)))
    params = lora.adapt(key, quantize(draw(rng, ALONE), ALONE, "nvfp4"), ALONE, rank=2)
    params = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.dtype == jnp.float32 else leaf, params)
    x = jnp.float32(rng.normal(size=(8, 2, 16)))
    wanted, (wanted_params, wanted_x) = gradients(ALONE, params, x)
    mesh = make_mesh(1, 2, 2, 2)
    held = placed(params, CONFIG, mesh)
    assert held["experts"]["w_out"].a.addressable_shards[0].data.shape == (4, 32, 2)
    with jax.set_mesh(mesh):
        y, (dparams, dx) = gradients(CONFIG, held, x)
    assert_close(y, wanted, "float32")
    assert_close(dx, wanted_x, "float32")
    for one, other in zip(jax.tree.leaves(dparams), jax.tree.leaves(wanted_params), strict=True):
        assert_close(one, other, "float32")


def test_quantize_keeps_the_split_of_the_experts(rng):
    mesh = make_mesh(1, 1, 4, 1)
    params = placed(draw(rng, CONFIG), CONFIG, mesh)
    with jax.set_mesh(mesh):
        codes = jax.jit(quantize, static_argnums=(1, 2))(params, CONFIG, "mxfp4")
    for leaf in jax.tree.leaves(codes["experts"]):
        assert leaf.sharding.spec[0] == "expert"
    alone = quantize(jax.device_get(params), CONFIG, "mxfp4")
    jax.tree.map(np.testing.assert_array_equal, codes, alone)


def test_a_mesh_that_would_cut_a_block_is_refused():
    codes = jax.eval_shape(lambda params: quantize(params, CONFIG, "mxfp4"), param_shapes(CONFIG))
    with pytest.raises(
        ConfigError, match=r"experts/w_in in mxfp4 has 64 inputs in groups of 32, which fsdp=4 would cut"
    ):
        param_specs(CONFIG, make_mesh(1, 4, 1, 1), codes)
    specs = param_specs(CONFIG, make_mesh(1, 1, 2, 1), codes)
    assert specs["experts"]["w_in"].scales["block"] == P("expert", None, None, None)
    assert specs["experts"]["w_out"].codes == P("expert", None, None, None)


def test_codes_that_are_stored_together_stay_together():
    """nvfp4 has a scale for each 16 inputs, but 32 of them share four words, if not the weight's last 16."""
    config = dataclasses.replace(CONFIG, latent_size=96, expert_intermediate_size=48)
    codes = jax.eval_shape(lambda params: quantize(params, config, "nvfp4"), param_shapes(config))
    with pytest.raises(
        ConfigError,
        match=r"experts/w_in in nvfp4 has 96 inputs in groups of 32, which fsdp=2 would cut: .* format .* as int8",
    ):
        param_specs(config, make_mesh(1, 2, 1, 1), codes)
    with pytest.raises(ConfigError, match=r"experts/w_out in nvfp4 has 48 inputs in groups of 32, which tensor=2"):
        param_specs(config, make_mesh(1, 1, 1, 2), codes)
    assert param_specs(config, make_mesh(1, 1, 4, 1), codes)["experts"]["w_out"].codes == P("expert", None, None, None)
    whole = jax.eval_shape(lambda params: quantize(params, config, "int8"), param_shapes(config))
    assert param_specs(config, make_mesh(1, 2, 1, 2), whole)["experts"]["w_in"].codes == P(None, None, "tensor", "fsdp")


def test_other_formats_keep_their_own_order(monkeypatch):
    """A format with two codes in a byte and no group may be cut between any bytes."""
    plain = dataclasses.replace(FORMATS["nvfp4"], name="plain4", group=1)
    monkeypatch.setitem(FORMATS, plain.name, plain)
    config = dataclasses.replace(CONFIG, latent_size=96)
    codes = jax.eval_shape(lambda params: quantize(params, config, "plain4"), param_shapes(config))
    specs = param_specs(config, make_mesh(1, 2, 1, 1), codes)
    assert specs["experts"]["w_in"].codes == P(None, None, None, "fsdp")


def test_a_last_half_of_a_group_on_a_mesh(rng):
    """48 inputs of each matrix, of which the last 16 are packed as two words."""
    config = dataclasses.replace(CONFIG, latent_size=48, expert_intermediate_size=48)
    alone = dataclasses.replace(config, parallel=None)
    params, x = quantize(draw(rng, alone), alone, "nvfp4"), jnp.float32(rng.normal(size=(8, 2, 16)))
    wanted, (_, wanted_x) = gradients(alone, params, x)
    mesh = make_mesh(2, 1, 4, 1)
    with jax.set_mesh(mesh):
        y, (_, dx) = gradients(config, placed(params, config, mesh), x)
    assert_close(y, wanted, "float32")
    assert_close(dx, wanted_x, "float32")
