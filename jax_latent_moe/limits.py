"""Limits on an expert's rows: capacity, padding to it, and rounding to tiles."""

from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_latent_moe import cost
from jax_latent_moe.errors import InputError
from jax_latent_moe.routing.permute import filled_to_capacity, first_rows, make_dispatch_plan, within_capacity
from jax_latent_moe.routing.rounding import round_to_tile
from jax_latent_moe.routing.router import CHOICE, NO_EXPERT


def padded_experts(experts, latent, expert_ids, weights, config, capacity, row_multiple):
    """The experts' weighted sums with `capacity` rows for each expert. Padding rows hold one more token, which is 0."""
    if not isinstance(capacity, int):
        raise InputError(
            f"x with {latent.shape[0]} tokens: router.pad_to_capacity needs a number of tokens that is known when the "
            "layer is traced. Set it to False to export the layer with symbolic sizes."
        )
    one_more = ((0, 1), (0, 0))
    latent, weights = jnp.pad(latent, one_more), jnp.pad(weights, one_more)
    expert_ids = jnp.pad(expert_ids, one_more, constant_values=NO_EXPERT)
    plan = make_dispatch_plan(expert_ids, config.num_experts, config.backend)
    plan = filled_to_capacity(plan, -(-capacity // row_multiple) * row_multiple, expert_ids.size - 1)
    return experts(latent, weights, plan)[:-1]


def expert_capacity(config, assignments) -> Any:
    """The assignments that one expert keeps. The argument may be a symbolic size of `jax.export`."""
    capacity = cost.share_of_rows(config.router.capacity_factor, assignments, config.num_experts)
    if isinstance(capacity, int):
        return min(max(capacity, config.router.min_capacity), assignments)
    return jnp.maximum(capacity, config.router.min_capacity)


def keep_within_capacity(expert_ids, weights, config, shards):
    """The assignments of these tokens that the experts keep [T, k], and the capacity, which is over all tokens."""
    expert_ids, weights = shards.gather_tokens(expert_ids), shards.gather_tokens(weights)
    capacity = expert_capacity(config, expert_ids.size)
    kept = within_capacity(expert_ids, weights, config.num_experts, capacity, config.router.drop_policy)
    return shards.own_tokens(kept), capacity


def keep_rounded(expert_ids, weights, config, shards):
    """Which assignments of these tokens the experts compute, [T, c]: an expert's number is rounded over all tokens."""
    expert_ids, weights = shards.gather_tokens(expert_ids), shards.gather_tokens(weights)
    kept = round_to_tile(expert_ids, weights, config.top_k, config.num_experts, config.router.round_to_tile)
    return checkpoint_name(shards.own_tokens(kept), CHOICE)


def rows_to_compute(plan, config):
    """The plan without rows that rounding leaves unused. It has twice the choices, and most of them are not added."""
    tokens, choices = plan.row_of_assignment.shape
    if config.router.round_to_tile is None or not isinstance(tokens, int):
        return plan
    most = most_rounded_rows(config, tokens)
    return first_rows(plan, most) if most < tokens * choices else plan


def most_rounded_rows(config, tokens: int) -> int:
    """The most assignments that the experts compute, of the chosen ones and those that rounding adds."""
    return tokens * config.top_k + config.num_experts * ((config.router.round_to_tile or 0) // 2)
