"""Checks of the arguments of `latent_moe`. Each raises an `InputError` with the name, the value and the rule."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_latent_moe.arrays import INT32, check_fits_int32
from jax_latent_moe.errors import InputError
from jax_latent_moe.routing.router import NO_EXPERT, ROUTER_DECIDES


def check_inputs(x, config, by_token):
    if x is None:
        raise InputError("x=None must be an array.")
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise InputError(f"x of shape {x.shape} must end in hidden_size={config.hidden_size}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"x of dtype {x.dtype} must be floating: cast or embed it first.")
    mask, expert_ids, segment_ids, _ = by_token
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != bool):
        raise InputError(
            f"token_mask of shape {mask.shape} and dtype {mask.dtype} must be bool of shape {x.shape[:-1]}."
        )
    if segment_ids is not None:
        _integers("segment_ids", segment_ids, x.shape[:-1])
    if expert_ids is None:
        if config.router.selection == "given":
            raise InputError("expert_ids=None: router.selection='given' needs the ids of the experts of every token.")
        return
    _integers("expert_ids", expert_ids, (*x.shape[:-1], config.top_k))
    if not isinstance(expert_ids, Tracer) and expert_ids.size:
        values = np.asarray(expert_ids)  # inside a jit, jnp's functions would trace the array
        low, high = values.min(), values.max()
        given = config.router.selection == "given"
        if low < (NO_EXPERT if given else ROUTER_DECIDES) or high >= config.num_experts:
            decides = "" if given else f", or {ROUTER_DECIDES} for a token that the router routes"
            raise InputError(
                f"expert_ids between {low} and {high} must be in [0, num_experts={config.num_experts}), or "
                f"{NO_EXPERT} for no expert{decides}."
            )


def _integers(name, values, shape):
    if values.shape != shape or not jnp.issubdtype(values.dtype, jnp.integer):
        raise InputError(f"{name} of shape {values.shape} and dtype {values.dtype} must be integers of shape {shape}.")


def check_whole(config, global_counts, key):
    """Refuses counts that do not fit, and arguments that nothing would read."""
    router = config.router
    if global_counts is not None:
        if not router.global_loss_coef:
            raise InputError("global_counts has no effect without router.global_loss_coef: set that, or leave it out.")
        _integers("global_counts", global_counts, (config.num_experts,))
        check_fits_int32("global_counts", global_counts)
    if key is not None and not router.input_jitter:
        raise InputError("key has no effect without router.input_jitter: set that, or leave the key out.")


def small_ids(segment_ids):
    """Segment ids that are equal where the given ones are, and that JAX does not cut to 32 bits."""
    if not isinstance(segment_ids, np.ndarray) or segment_ids.dtype.itemsize < 8 or not segment_ids.size:
        return segment_ids
    if INT32.min <= segment_ids.min() and segment_ids.max() <= INT32.max:
        return segment_ids
    return np.unique(segment_ids, return_inverse=True)[1].reshape(segment_ids.shape).astype(np.int32)
