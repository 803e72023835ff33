"""The parameter tree: shapes, dtypes, axes, first values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import InitConfig, RouterConfig, init_params, param_axes, param_shapes
from tests import cases
from tests.cases import TOY
from tests.random_configs import random_config

WIDE = dataclasses.replace(TOY, hidden_size=64, latent_size=48, expert_intermediate_size=40)


@functools.cache
def init(config, seed=0):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(seed), config)


@pytest.mark.parametrize("index", range(12))
def test_random_layers_have_the_documented_tree(rng, index):
    config = random_config(rng)
    expected = cases.param_shapes(config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(lambda: init(config)))
    assert shapes == expected
    assert jax.tree.map(lambda leaf: leaf.shape, param_shapes(config)) == expected
    ranks = {part: {name: len(axes) for name, axes in leaves.items()} for part, leaves in param_axes(config).items()}
    assert ranks == {part: {n: len(shape) for n, shape in leaves.items()} for part, leaves in expected.items()}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
def test_the_correction_bias_is_float32_whatever_the_rest(param_dtype):
    config = dataclasses.replace(TOY, param_dtype=param_dtype, latent_norm="post")
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init.__wrapped__(config))):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == (jnp.float32 if name == "router/bias" else param_dtype), name


def test_kernels_are_drawn_with_the_fan_in_deviation():
    params = init(WIDE)
    for part, name, fan_in in [
        ("router", "kernel", 64), ("down_proj", "kernel", 64), ("up_proj", "kernel", 48),
        ("experts", "w_in", 48), ("experts", "w_out", 40), ("shared", "w_in", 64), ("shared", "w_out", 7),
    ]:  # fmt: skip
        kernel = np.asarray(params[part][name])
        assert abs(kernel.mean()) < 6 / math.sqrt(fan_in * kernel.size)
        assert kernel.std() == pytest.approx(1 / math.sqrt(fan_in), rel=4 / math.sqrt(kernel.size)), (part, name)
        assert np.abs(kernel).max() <= 2.3 / math.sqrt(fan_in)


def test_a_new_leaf_leaves_the_values_of_the_others():
    gated = init(dataclasses.replace(WIDE, shared_expert_gate=True))
    gate = gated["shared"].pop("gate")
    assert gate.shape == (64, 1)
    assert np.asarray(gate).std() == pytest.approx(1 / 8, rel=0.5)
    jax.tree.map(np.testing.assert_array_equal, gated, init(WIDE))


def test_scales_are_one_and_the_bias_is_zero():
    config = dataclasses.replace(TOY, latent_norm="pre", router=RouterConfig(per_expert_scale=True))
    params = init(config)
    assert (np.asarray(params["latent_norm"]["scale"]) == 1).all()
    assert (np.asarray(params["router"]["scale"]) == 1).all()
    assert (np.asarray(params["router"]["bias"]) == 0).all()


def test_output_scale_reaches_the_residual_writers_alone():
    plain = init(WIDE)
    for scale_expert_output in (True, False):
        scaled = init(
            dataclasses.replace(WIDE, init=InitConfig(output_scale=0.5, scale_expert_output=scale_expert_output))
        )
        halved = {("up_proj", "kernel"), ("shared", "w_out")}
        halved |= {("experts", "w_out")} if scale_expert_output else set()
        for part, leaves in plain.items():
            for name, leaf in leaves.items():
                factor = 0.5 if (part, name) in halved else 1.0
                np.testing.assert_allclose(scaled[part][name], factor * leaf, rtol=1e-6)


def test_std_sets_every_kernel():
    params = init(dataclasses.replace(WIDE, init=InitConfig(std=0.02)))
    for part, name in [("router", "kernel"), ("experts", "w_in"), ("experts", "w_out"), ("shared", "w_in")]:
        assert np.asarray(params[part][name]).std() == pytest.approx(0.02, rel=0.1)


def test_keys_decide_the_values():
    first, again, other = init(TOY), init.__wrapped__(TOY), init(TOY, seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [jax.tree.leaves(tree["experts"])[0] for tree in (first, other)]
    assert not np.array_equal(*kernels)
    experts = np.asarray(first["experts"]["w_in"])
    assert len({expert.tobytes() for expert in experts}) == TOY.num_experts


def test_a_part_left_out_changes_no_other():
    """The same key gives the same router whatever else the layer has."""
    plain = dataclasses.replace(TOY, shared_expert_intermediate_size=0, router=RouterConfig(correction_bias=False))
    np.testing.assert_array_equal(init(plain)["router"]["kernel"], init(TOY)["router"]["kernel"])
