"""Layers with every kind of parameter, and inputs, for the tests of both Flax APIs."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_latent_moe import LatentMoEConfig, RouterConfig, latent_moe, param_shapes

FULL = LatentMoEConfig(
    hidden_size=12,
    latent_size=6,
    num_experts=8,
    top_k=3,
    expert_intermediate_size=5,
    shared_expert_intermediate_size=7,
    activation="swiglu",
    latent_norm="post",
    router=RouterConfig(
        per_expert_scale=True, switch_loss_coef=0.3, sequence_loss_coef=0.2, z_loss_coef=0.1, bias_update_rate=0.25
    ),
    dtype="float32",
)
BARE = LatentMoEConfig(
    hidden_size=12,
    latent_size=None,
    num_experts=4,
    top_k=2,
    expert_intermediate_size=5,
    router=RouterConfig(correction_bias=False),
    dtype="float32",
)
SMALL = dataclasses.replace(BARE, router=RouterConfig(switch_loss_coef=0.3, z_loss_coef=0.1))
"""The fewest parameters with a correction bias among them, and losses: quick to compile."""
HALF = dataclasses.replace(FULL, dtype="bfloat16", param_dtype="bfloat16")
CONFIGS = {"full": FULL, "bare": BARE, "half": HALF}
OTHER = dataclasses.replace(FULL, top_k=2, num_experts=6, expert_intermediate_size=9)
"""A second layer for a model with FULL."""


def inputs(rng, config=FULL, leading=(2, 5)) -> jax.Array:
    return jnp.asarray(rng.normal(size=(*leading, config.hidden_size)), config.dtype)


def mask_and_ids(rng, config=FULL, leading=(2, 5)) -> dict:
    """A token mask and a routing to replay, as the keyword arguments of a layer."""
    ids = rng.permuted(jnp.broadcast_to(jnp.arange(config.num_experts), (*leading, config.num_experts)), axis=-1)
    return dict(
        token_mask=jnp.asarray(rng.random(leading) < 0.7), expert_ids=jnp.asarray(ids[..., : config.top_k], jnp.int32)
    )


def fill(rng, shapes):
    """Random values for a tree of shapes: what an initialiser gives, without compiling one, and a bias other than 0."""
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def draw(rng, config=FULL) -> dict:
    """Random parameters of the function."""
    return fill(rng, param_shapes(config))


def objective(y, losses) -> jax.Array:
    """A loss that needs every output: a sum of squares and all auxiliary losses."""
    return jnp.sum(jnp.square(y.astype(jnp.float32))) + sum(map(jnp.sum, jax.tree.leaves(losses)))


def functional_gradients(params, x, config=FULL):
    def loss(params):
        y, aux = latent_moe(params, x, config)
        return objective(y, aux.losses)

    return jax.jit(jax.grad(loss))(params)
