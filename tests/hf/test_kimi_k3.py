"""An imported Kimi K3 layer against the block's published definition: outputs, and gradients by finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import hf, latent_moe
from tests.hf import kimi_k3
from tests.hf.checkpoints import KIMI_K3, kimi, random_tensors, save
from tests.tolerances import assert_close

PREFIX = "language_model.model.layers.1.block_sparse_moe."
VARIANTS = {
    "published": {},
    "groups": dict(num_expert_group=2, topk_group=1, routed_scaling_factor=2.5),
    "not renormalised": dict(moe_renormalize=False),
    "linear up": dict(activation_situ_linear_beta=None),
    "no norm": dict(latent_moe_use_norm=False),
}


@functools.cache
def layer(config):
    return jax.jit(
        lambda params, x: latent_moe(params, x, config)[0], compiler_options={"xla_backend_optimization_level": 0}
    )


def a_layer(rng, folder, variant):
    """(config.json's text_config, tensors by name within the block, layer's config, parameters in float32)."""
    text = KIMI_K3["text_config"] | VARIANTS[variant] | dict(num_hidden_layers=2)
    shapes = kimi(PREFIX)
    if not text["latent_moe_use_norm"]:
        del shapes[PREFIX + "routed_expert_norm.weight"]
    tensors = random_tensors(rng, shapes)
    bias = PREFIX + "gate.e_score_correction_bias"
    tensors[bias] -= np.float32(64)  # in float64 and float32 alike
    save(folder, KIMI_K3 | dict(text_config=text), tensors)
    checkpoint = hf.open_checkpoint(folder)
    params = hf.import_layer(checkpoint, 1, dtype="float32")
    return text, {name.removeprefix(PREFIX): t for name, t in tensors.items()}, checkpoint.configs[1], params


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(variant, rng, tmp_path):
    text, tensors, config, params = a_layer(rng, tmp_path, variant)
    x = rng.normal(size=(9, 16)).astype(np.float32)
    wanted = kimi_k3.block(tensors, text, x)
    assert_close(layer(dataclasses.replace(config, dtype="float32"))(params, x), wanted, "float32")
    rounded = jnp.asarray(x, jnp.bfloat16)
    wanted = kimi_k3.block(tensors, text, np.asarray(rounded, np.float32))
    assert_close(layer(config)(params, rounded), wanted, "bfloat16")


def test_gradient_of_the_input(rng, tmp_path):
    text, tensors, config, params = a_layer(rng, tmp_path, "published")
    config = dataclasses.replace(config, dtype="float32")
    x, dy = (rng.normal(size=(5, 16)).astype(np.float32) for _ in range(2))
    dx = jax.grad(lambda x: jnp.sum(layer(config)(params, x) * dy))(jnp.asarray(x))
    step = 1e-5
    wanted = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        change = np.zeros(x.shape)
        change[index] = step
        high, low = (kimi_k3.block(tensors, text, x + sign * change) for sign in (1, -1))
        wanted[index] = np.sum((high - low) * dy) / (2 * step)
    assert_close(dx, wanted, "float32")
