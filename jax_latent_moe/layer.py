"""The latent mixture-of-experts layer, top to bottom, as one pure function."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe import cost
from jax_latent_moe.activations import activate
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.errors import InputError
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.formats import ScaledArray, row_multiple_of
from jax_latent_moe.parallel.exchange import exchange, own_experts_of_all
from jax_latent_moe.parallel.mesh import in_auto_mode, over_mesh
from jax_latent_moe.parallel.shards import ONE_DEVICE
from jax_latent_moe.params import Params, as_array, check_params
from jax_latent_moe.routing.expert_sort import count_experts
from jax_latent_moe.routing.permute import make_dispatch_plan, within_capacity
from jax_latent_moe.routing.router import (
    CHOICE,
    NO_EXPERT,
    ROUTER_DECIDES,
    auxiliary_losses,
    route,
    router_logits,
    router_logits_and_projection,
)
from jax_latent_moe.varying import varying

LATENT = "latent_moe_latent"


class LatentMoEAux(NamedTuple):
    """What the layer says of its routing.

    Attributes:
        expert_ids: [..., k] int32, the chosen experts; -1 reaches none. Give it back as `expert_ids` to replay.
        weights: [..., k] float32, their combine weights.
        tokens_per_expert: [E] int32, tokens that chose each expert, before capacity drops any; of all devices.
        dropped_per_expert: [E] int32, of these, the ones dropped for a capacity, the router's or the dispatch's.
        losses: auxiliary losses "switch", "sequence" and "z", coefficients applied.
    """

    expert_ids: Int[Array, "*batch k"]
    weights: Float[Array, "*batch k"]
    tokens_per_expert: Int[Array, " e"]
    dropped_per_expert: Int[Array, " e"]
    losses: dict[str, Float[Array, ""]]


def latent_moe(
    params: Params,
    x: Float[Array, "*batch d"],
    config: LatentMoEConfig,
    *,
    token_mask: Bool[Array, "*batch"] | None = None,
    expert_ids: Int[Array, "*batch k"] | None = None,
) -> tuple[Float[Array, "*batch d"], LatentMoEAux]:
    """Computes y = up_proj(sum_j weight_j expert_j(down_proj(x))) + shared(x), routed by x (arXiv 2601.18089).

    With config.shared_expert_gate, shared(x) is multiplied by sigmoid(x @ gate) (arXiv 2407.10671, section 2.2.2).

    With config.parallel the layer is spread over the mesh that `jax.set_mesh` set: see `jax_latent_moe.parallel`.

    Args:
        params: as `init_params` makes them.
        x: [..., d], floating, or what NumPy makes such an array of; read in config.dtype, by the router in its own.
        config: the layer; static under jit.
        token_mask: [...]; a token that is False enters nothing and its output is zero: padding may hold anything, and
            so may the gradient of its output.
        expert_ids: [..., k] integers: replay this choice, with weights (and gradients) from the scores there. -1
            reaches no expert; the router itself routes a token with -2 among its ids.

    Returns:
        y: [..., d] in config.dtype.
        aux: `LatentMoEAux`.

    Raises:
        InputError: the parameters or an array do not fit the config.
        ConfigError: an axis of the mesh does not divide what it splits.
        UnsupportedError: the named backend, or the named dispatch, cannot run this layer.
    """
    if not isinstance(config, LatentMoEConfig):
        raise InputError(f"config of type {type(config).__name__} must be a LatentMoEConfig.")
    params = check_params(params, config)
    given = as_array("x", x), as_array("token_mask", token_mask), as_array("expert_ids", expert_ids)
    _check_inputs(given[0], config, *given[1:])
    x, token_mask, expert_ids = jax.tree.map(jnp.asarray, given)
    layer = partial(_layer, config)
    run = partial(layer, ONE_DEVICE) if config.parallel is None else partial(over_mesh, layer, config)
    by_token, totals = in_auto_mode(run, params, x, token_mask, expert_ids)
    y, chosen_ids, weights = by_token
    tokens_per_expert, dropped, losses = totals
    return y, LatentMoEAux(chosen_ids, weights, tokens_per_expert, dropped, losses)


def _layer(config, shards, params, x, token_mask, expert_ids):
    """The layer on one device's tokens, experts and inner widths: (what is split as x is, what is one for all)."""
    batch, tokens = x.shape[:-1], x.reshape(-1, config.hidden_size)
    mask = None if token_mask is None else token_mask.reshape(-1)
    if mask is not None:
        tokens = jnp.where(mask[:, None], tokens, 0)

    router = params["router"]
    router_dtype = config.router.dtype
    if config.latent_size is None:
        logits, latent = router_logits(tokens, router["kernel"], router_dtype), tokens.astype(config.dtype)
    else:
        down = params["down_proj"]["kernel"].astype(config.dtype)
        logits, latent = router_logits_and_projection(tokens, router["kernel"], router_dtype, down)
    routing = route(
        logits,
        config.router,
        config.top_k,
        bias=router.get("bias"),
        scale=router.get("scale"),
        routed_scaling_factor=1.0 if config.apply_routed_scale_to_output else None,
        token_mask=mask,
        expert_ids=None if expert_ids is None else expert_ids.reshape(-1, config.top_k),
        backend=config.backend,
    )

    tokens = tokens.astype(config.dtype)
    if config.latent_norm == "pre":
        latent = _rms_norm(latent, params["latent_norm"]["scale"], config.latent_norm_eps)
    latent = checkpoint_name(latent, LATENT)
    combined, dropped = _route_through_experts(params["experts"], latent, routing, config, shards)
    # Parts of the inner widths add up once, in y, if the shared expert has parts as well and no norm stands between.
    sum_in_y = "shared" in params and config.latent_norm != "post"
    if not sum_in_y:
        combined = shards.sum_over_tensor(combined)
    if config.latent_norm == "post":
        combined = _rms_norm(combined, params["latent_norm"]["scale"], config.latent_norm_eps)
    if config.apply_routed_scale_to_output:
        combined *= config.router.routed_scaling_factor
    y = combined if config.latent_size is None else _project(combined, params["up_proj"])
    if "shared" in params:
        shared = _shared_expert(tokens, params["shared"], config)
        y = shards.sum_over_tensor(y + shared) if sum_in_y else y + shards.sum_over_tensor(shared)
    if mask is not None:  # zero as it is: what keeps the gradient of padding rows out
        y = jnp.where(mask[:, None], y, 0)

    sequences = (math.prod(batch[:-1]), batch[-1] if batch else 1)
    losses = auxiliary_losses(
        logits.reshape(*sequences, config.num_experts),
        config.router,
        config.top_k,
        None if mask is None else mask.reshape(sequences),
        all_tokens=shards.sum_over_tokens,
        sequences_split=shards.sequences_split,
        backend=config.backend,
    )
    by_token = (y.reshape(x.shape), *(part.reshape(*batch, config.top_k) for part in routing))
    load = count_experts(routing.expert_ids, config.num_experts, config.backend)
    return by_token, (shards.sum_over_tokens(load), shards.sum_over_tokens(dropped), losses)


def _route_through_experts(params, latent, routing, config, shards):
    """Weighted sum of the experts' outputs, [T, l], and the choices of these tokens that capacity dropped, [E]."""
    expert_ids, weights = routing
    dropped = jnp.zeros(config.num_experts, jnp.int32)
    if config.router.capacity_factor is not None:
        kept = checkpoint_name(_within_capacity(expert_ids, weights, config, shards), CHOICE)
        dropped_ids = jnp.where(kept, NO_EXPERT, expert_ids)
        dropped = count_experts(dropped_ids, config.num_experts, config.backend)
        expert_ids, weights = jnp.where(kept, expert_ids, NO_EXPERT), jnp.where(kept, weights, 0)
    if config.apply_probs_on_input:
        latent = (latent.astype(weights.dtype) * weights).astype(latent.dtype)
        weights = (expert_ids != NO_EXPERT).astype(weights.dtype)

    w_in, w_out = (_expert_weight(params[name], config) for name in ("w_in", "w_out"))

    row_multiple = row_multiple_of(w_in, w_out)

    def experts(latent, weights, plan):
        latent, weights, own_w_in, own_w_out = varying((latent, weights, w_in, w_out), latent, weights, w_in, w_out)
        return routed_experts(config, latent, weights, own_w_in, own_w_out, plan)

    if shards.expert_axis is None:
        plan = make_dispatch_plan(expert_ids, config.num_experts, config.backend, row_multiple)
        return experts(latent, weights, plan), dropped
    if not shards.token_axes:
        combined = own_experts_of_all(
            config, shards.expert_axis, experts, latent, expert_ids, weights, row_multiple=row_multiple
        )
        return combined, dropped
    combined, not_sent = exchange(
        config, shards.expert_axis, experts, latent, expert_ids, weights, row_multiple=row_multiple
    )
    return combined, dropped + not_sent


def _expert_weight(weight, config):
    """An expert weight as the products read it: codes stay codes, arrays are cast to the compute dtype."""
    return weight if isinstance(weight, ScaledArray) else weight.astype(config.dtype)


def _within_capacity(expert_ids, weights, config, shards):
    """Which choices of these tokens the experts keep, [T, k]: an expert's capacity is one over all tokens."""
    expert_ids, weights = shards.gather_tokens(expert_ids), shards.gather_tokens(weights)
    capacity = cost.share_of_rows(config.router.capacity_factor, expert_ids.size, config.num_experts)
    if isinstance(capacity, int):
        capacity = min(max(capacity, config.router.min_capacity), expert_ids.size)
    else:  # of the symbolic sizes of jax.export
        capacity = jnp.maximum(capacity, config.router.min_capacity)
    kept = within_capacity(expert_ids, weights, config.num_experts, capacity, config.router.drop_policy)
    return shards.own_tokens(kept)


def _project(x: Float[Array, "t a"], params) -> Float[Array, "t b"]:
    return x @ params["kernel"].astype(x.dtype)


def _shared_expert(x: Float[Array, "t d"], params, config) -> Float[Array, "t d"]:
    w_in, w_out = (params[name].astype(x.dtype) for name in ("w_in", "w_out"))
    out = activate(x @ w_in.reshape(w_in.shape[0], -1), config.bound_activation).astype(x.dtype) @ w_out
    if "gate" not in params:
        return out
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gate = jnp.matmul(x, params["gate"].astype(x.dtype), preferred_element_type=wide)
    return (out.astype(wide) * jax.nn.sigmoid(gate)).astype(x.dtype)


def _rms_norm(x: Float[Array, "t l"], scale: Float[Array, " l"], eps: float) -> Float[Array, "t l"]:
    wide = x.astype(at_least_float32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(wide.dtype)[None]).astype(x.dtype)


def _check_inputs(x, config, token_mask, expert_ids):
    if x is None:
        raise InputError("x=None must be an array.")
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise InputError(f"x of shape {x.shape} must end in hidden_size={config.hidden_size}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"x of dtype {x.dtype} must be floating: cast or embed it first.")
    if token_mask is not None and (token_mask.shape != x.shape[:-1] or token_mask.dtype != bool):
        raise InputError(
            f"token_mask of shape {token_mask.shape} and dtype {token_mask.dtype} must be bool of shape {x.shape[:-1]}."
        )
    if expert_ids is None:
        return
    expected = (*x.shape[:-1], config.top_k)
    if expert_ids.shape != expected or not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise InputError(
            f"expert_ids of shape {expert_ids.shape} and dtype {expert_ids.dtype} must be integers of shape {expected}."
        )
    if not isinstance(expert_ids, Tracer) and expert_ids.size:
        values = np.asarray(expert_ids)  # NumPy's own functions would trace the array inside of a jit
        low, high = values.min(), values.max()
        if low < ROUTER_DECIDES or high >= config.num_experts:
            raise InputError(
                f"expert_ids between {low} and {high} must lie in [0, num_experts={config.num_experts}), or be "
                f"{NO_EXPERT} for no expert, {ROUTER_DECIDES} for a token that the router shall route."
            )
