"""Codes that a training step makes on a mesh: each device encodes its own part of the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jax_latent_moe import ParallelConfig, Precision, RouterConfig, encode_experts, init_params, latent_moe
from jax_latent_moe.parallel import param_specs
from tests.oracle import formats as oracle
from tests.parallel.meshes import BASE, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
BOTH = Precision("fp8_block", "fp8_block")
CONFIG = dataclasses.replace(
    BASE,
    latent_size=256,
    expert_intermediate_size=272,
    shared_expert_intermediate_size=0,
    activation="swiglu",
    router=RouterConfig(correction_bias=False),
    precision=BOTH,
)
CUT = dataclasses.replace(CONFIG, latent_size=24, activation="relu2")
"""fsdp would cut its blocks of 24."""


def test_a_tensor_axis_encodes_each_part_of_the_inner_width():
    """Blocks begin anew in each part: 136 columns of gate and of up have two blocks each, one of them partial."""
    params = init_params(jax.random.key(0), CONFIG)
    with jax.set_mesh(make_mesh(1, 2, 2, 2)):
        codes = jax.jit(encode_experts, static_argnums=1)(params, CONFIG)
    assert codes.fwd_in.codes.addressable_shards[0].data.shape == (4, 2, 136, 128)
    w_in = np.asarray(params["experts"]["w_in"])
    for own in (slice(0, 136), slice(136, 272)):
        for part in (0, 1):
            wanted, scales = oracle.fp8_block(w_in[5, :, part, own].T)
            np.testing.assert_array_equal(codes.fwd_in.codes[5, part, own], wanted)
            blocks = slice(0, 2) if own.start == 0 else slice(2, 4)
            np.testing.assert_array_equal(codes.fwd_in.scales["block"][5, part, blocks], scales["block"])


@pytest.mark.parametrize("latent_size", [24, 256], ids=["cut", "whole"])
def test_gradients_have_the_bits_of_encoding_in_the_call(rng, latent_size):
    """Codes of other weights give NaN, on a mesh too."""
    config = dataclasses.replace(CUT, latent_size=latent_size)
    x = rng.normal(size=(8, 16)).astype(np.float32)

    def loss(params, x, codes):
        return jnp.sum(latent_moe(params, x, config, codes=codes)[0])

    mesh = make_mesh(1, 2, 1, 2)
    places = jax.tree.map(functools.partial(NamedSharding, mesh), param_specs(config, mesh))
    params = jax.device_put(init_params(jax.random.key(0), config), places)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss))
        codes = jax.jit(encode_experts, static_argnums=1)(params, config)
        in_call, before = run(params, x, None), run(params, x, codes)
        moved = params | {"experts": params["experts"] | {"w_out": 2 * params["experts"]["w_out"]}}
        stale, _ = run(moved, x, codes)
    for one, other in zip(jax.tree.leaves(in_call), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isfinite(before[0])
    assert np.isnan(stale)


def test_stacked_layers_and_explicit_axes(rng):
    """The same codes as layer by layer on one device, where no axis cuts the inner width."""
    alone = dataclasses.replace(CONFIG, parallel=None, num_experts=4, expert_intermediate_size=136)
    layers = [init_params(jax.random.key(seed), alone) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    encode = jax.jit(encode_experts, static_argnums=1)
    wanted = jax.tree.map(lambda *leaves: np.stack(leaves), *(encode(params, alone) for params in layers))
    meshes = make_mesh(1, 2, 2, 1), jax.make_mesh((2, 2), ("fsdp", "expert"), devices=jax.devices()[:4])
    for mesh in meshes:
        with jax.set_mesh(mesh):
            config = dataclasses.replace(alone, parallel=ParallelConfig())
            codes = encode(stacked, config)
        for name in ("fwd_in", "fwd_out", "dgrad_in", "dgrad_out"):
            for one, other in zip(*(jax.tree.leaves(getattr(tree, name)) for tree in (codes, wanted)), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("parallel", [None, ParallelConfig()], ids=["alone", "parallel"])
def test_explicit_axes_in_a_step(rng, parallel):
    config = dataclasses.replace(CUT, parallel=parallel)
    params, mesh = init_params(jax.random.key(0), config), jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.float32(rng.normal(size=(8, 16))), NamedSharding(mesh, jax.P("expert")))
        specs = param_specs(dataclasses.replace(CUT, parallel=ParallelConfig()), mesh)
        params = jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))
        run = jax.jit(lambda params, x, codes: latent_moe(params, x, config, codes=codes)[0])
        codes = jax.jit(encode_experts, static_argnums=1)(params, config)
        np.testing.assert_array_equal(run(params, x, codes), run(params, x, None))


def test_tokens_that_the_devices_do_not_divide(rng):
    config, mesh = dataclasses.replace(CUT, parallel=ParallelConfig()), make_mesh(1, 2, 1, 2)
    params, x = init_params(jax.random.key(0), config), jnp.float32(rng.normal(size=(3, 16)))
    run = jax.jit(lambda params, x, codes: latent_moe(params, x, config, codes=codes)[0])
    with jax.set_mesh(mesh):
        codes = jax.jit(encode_experts, static_argnums=1)(params, config)
        np.testing.assert_array_equal(run(params, x, codes), run(params, x, None))
