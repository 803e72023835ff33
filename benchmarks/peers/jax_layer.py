"""The layer in plain JAX around a ragged_dot: argsort, gather, two products, un-sort, sum."""

import jax.numpy as jnp

from jax_latent_moe.activations import activate
from jax_latent_moe.routing.router import route, router_logits


def layer(params, x, config, ragged_dot):
    """The routed experts on x: [T, d] -> [T, d], differentiated by JAX and by ragged_dot's own rule.

    Args:
        params: from `jax_latent_moe.init_params`.
        x: [T, d].
        config: a layer without shared expert and latent norm.
        ragged_dot: rows [R, K], w [E, K, N], group_sizes -> [R, N].
    """
    logits = router_logits(x, params["router"]["kernel"], config.router.dtype)
    expert_ids, weights = route(logits, config.router, config.top_k, bias=params["router"].get("bias"))[:2]
    latent = x if config.latent_size is None else x @ params["down_proj"]["kernel"]
    order = jnp.argsort(expert_ids.reshape(-1), stable=True)
    group_sizes = jnp.bincount(expert_ids.reshape(-1), length=config.num_experts).astype(jnp.int32)
    w_in, w_out = params["experts"]["w_in"], params["experts"]["w_out"]
    pre = ragged_dot(latent[order // config.top_k], w_in.reshape(*w_in.shape[:2], -1), group_sizes)
    out = ragged_dot(activate(pre, config.bound_activation).astype(x.dtype), w_out, group_sizes)
    by_token = out[jnp.argsort(order)].reshape(x.shape[0], config.top_k, -1)
    combined = jnp.sum(by_token.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype)
    return combined if config.latent_size is None else combined @ params["up_proj"]["kernel"]
