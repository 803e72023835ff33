"""Token rounding: each expert's number of tokens becomes a multiple of a tile, so that no tile has padding rows.

The method is SonicMoE's (arXiv 2512.14080, section 5), to the nearest multiple. Rounding down drops the assignments of
least weight. Rounding up adds tokens that did not choose the expert. Here they come from the tokens that have it among
their next k experts, so that a token has at most 2 k; in the paper they may be any.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import RouterConfig
from jax_latent_moe.routing.expert_sort import count_experts, no_expert_last
from jax_latent_moe.routing.router import CHOICE, NO_EXPERT, Routing, at_ids, selection
from jax_latent_moe.routing.scores import log_scores, scores
from jax_latent_moe.routing.top_k import top_k_ids


def with_next_choices(
    logits: Float[Array, "t e"],
    routing: Routing,
    config: RouterConfig,
    *,
    bias: Float[Array, " e"] | None,
    scale: Float[Array, " e"] | None,
    factor: float,
    backend="auto",
) -> Routing:
    """The routing with as many more experts for each token: the best that it did not choose, [T, k + min(k, E - k)].

    The token's own choices keep their weights. If weights are normalised, that of a further expert is its score over
    the sum of the own scores and its own.

    Args:
        logits: [T, E].
        routing: from `route`.
        config: the router.
        bias: the correction bias [E].
        scale: [E], a learned factor on the weights.
        factor: another factor on the weights.
        backend: as for `route`.
    """
    ids, weights = routing[:2]
    (tokens, k), experts = ids.shape, logits.shape[1]
    chosen = ids != NO_EXPERT
    places = jnp.arange(tokens)[:, None], jnp.where(chosen, ids, experts)
    taken = jnp.zeros((tokens, experts + 1), bool).at[places].set(True)[:, :experts]
    free = jnp.where(taken, -jnp.inf, selection(logits, bias, config))
    more = checkpoint_name(top_k_ids(free, min(k, experts - k), backend), CHOICE)
    # A token without any expert is masked. One that the groups leave too few experts has -inf among its next ones.
    real = jnp.any(chosen, axis=1, keepdims=True) & (at_ids(free, more) > -jnp.inf)
    added = _weights_beside(logits, jnp.where(chosen, ids, 0), chosen, more, config) * factor
    if scale is not None:
        added = added * scale.astype(added.dtype)[more]
    both = jnp.concatenate([ids, jnp.where(real, more, NO_EXPERT)], axis=1)
    return Routing(both, jnp.concatenate([weights, jnp.where(real, added, 0)], axis=1))


def _weights_beside(logits, ids, chosen, more, config) -> Float[Array, "t m"]:
    """The score of each of `more`, over the sum of the chosen scores and its own."""
    # The sum of a token without any choice is that of its dummy ids: its weights are not used, and must be finite.
    summed = chosen | ~jnp.any(chosen, axis=1, keepdims=True)
    own, others = at_ids(logits, ids), at_ids(logits, more)
    if config.score_function == "softmax_topk" or (config.norm_topk_prob and config.norm_topk_eps == 0):
        own, others = (log_scores(part, config.score_function) for part in (own, others))
        total = jax.nn.logsumexp(jnp.where(summed, own, jnp.finfo(own.dtype).min), axis=1, keepdims=True)
        beside = jax.nn.sigmoid(others - total)
        return beside / (1 + config.norm_topk_eps) if config.norm_topk_prob else beside
    if config.score_function == "softmax":
        probabilities = jax.nn.softmax(logits, axis=1)
        own, others = at_ids(probabilities, ids), at_ids(probabilities, more)
    else:
        own, others = (scores(part, config.score_function) for part in (own, others))
    if not config.norm_topk_prob:
        return others
    # An exact factor: the derivative of a quotient squares its divisor.
    own, others, eps = (part * 2.0**40 for part in (own, others, config.norm_topk_eps))
    return others / (jnp.sum(jnp.where(summed, own, 0), axis=1, keepdims=True) + others + eps)


def round_to_tile(
    expert_ids: Int[Array, "t c"], weights: Float[Array, "t c"], own_choices: int, num_experts: int, tile: int
) -> Bool[Array, "t c"]:
    """Which assignments the experts compute, such that each has a multiple of `tile`.

    An expert's number of own choices goes to the nearest multiple, a half up; down if it lacks tokens to add. It keeps
    its own choices before the next ones, and larger weights before smaller ones, the earlier token first of equals.

    Args:
        expert_ids: [T, c], own choices and then the next ones; an id outside [0, num_experts) is no expert.
        weights: [T, c].
        own_choices: k.
        num_experts: E.
        tile: rows of a tile.
    """
    expert = no_expert_last(expert_ids.reshape(-1), num_experts)
    added = jnp.broadcast_to(jnp.arange(expert_ids.shape[1]) >= own_choices, expert_ids.shape).reshape(-1)
    order = jnp.lexsort((-lax.stop_gradient(weights).reshape(-1), added, expert))
    sizes = count_experts(expert_ids, num_experts)
    own = count_experts(expert_ids[:, :own_choices], num_experts)
    rounded = (own + tile // 2) // tile * tile
    rounded = jnp.where(rounded > sizes, own // tile * tile, rounded)
    first = jnp.cumulative_sum(sizes, include_initial=True, dtype=sizes.dtype)[expert[order]]
    place = jnp.arange(expert.size, dtype=expert.dtype) - first
    rank = jnp.zeros_like(expert).at[order].set(place, unique_indices=True)
    return (rank < jnp.append(rounded, 0)[expert]).reshape(expert_ids.shape)
