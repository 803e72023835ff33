"""Which experts a token reaches and with what weight; the losses and the bias that keep the experts' loads even."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import RouterConfig
from jax_latent_moe.device import current_device
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.errors import InputError
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.routing.expert_sort import count_experts, int32_ids
from jax_latent_moe.routing.split_matmul import split_matmul, split_matmul_beside
from jax_latent_moe.routing.top_k import top_k_ids

NO_EXPERT = -1
"""In a routing to replay: this choice reaches no expert."""

ROUTER_DECIDES = -2
"""In a routing to replay: the router chooses all experts of a token that holds it."""


CHOICE = "latent_moe_choice"
"""The checkpoint name of every discrete choice: of experts, for the losses' counts, and of what capacity keeps."""

_save_choice = jax.checkpoint_policies.save_only_these_names(CHOICE)


def pin_choice(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """A policy of `jax.checkpoint` that saves the choices alone: what is computed again is routed as it was."""
    return _save_choice(primitive, *arguments, **parameters)


class Routing(NamedTuple):
    """The choice of each token.

    Attributes:
        expert_ids: [T, k] int32, `NO_EXPERT` where a choice reaches no expert.
        weights: [T, k] float32 (float64 in a float64 router), 0 where a choice reaches no expert.
    """

    expert_ids: Int[Array, "t k"]
    weights: Float[Array, "t k"]


def router_logits(x: Float[Array, "t d"], kernel: Float[Array, "d e"], dtype: str) -> Float[Array, "t e"]:
    """Logits x @ kernel: operands in `dtype`, accumulated and returned in at least float32, never in tf32.

    On a GPU with bfloat16 tokens, gradients read rounded gradients of the logits: see `split_matmul`.
    """
    if _splits(x, dtype):
        return split_matmul(x, kernel)
    wide = at_least_float32(dtype)
    return jnp.matmul(
        x.astype(dtype), kernel.astype(dtype), precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )


def router_logits_and_projection(
    x: Float[Array, "t d"], kernel: Float[Array, "d e"], dtype: str, projection: Float[Array, "d l"]
) -> tuple[Float[Array, "t e"], Float[Array, "t l"]]:
    """`router_logits`, and x @ projection in the projection's type."""
    if _splits(x, dtype) and projection.dtype == x.dtype:
        return split_matmul_beside(x, kernel, projection)
    return router_logits(x, kernel, dtype), x.astype(projection.dtype) @ projection


def _splits(x, dtype) -> bool:
    return dtype == "float32" and x.dtype == jnp.bfloat16 and current_device().platform == "gpu"


def route(
    logits: Float[Array, "t e"],
    config: RouterConfig,
    top_k: int,
    *,
    bias: Float[Array, " e"] | None = None,
    scale: Float[Array, " e"] | None = None,
    routed_scaling_factor: float | None = None,
    token_mask: Bool[Array, " t"] | None = None,
    expert_ids: Int[Array, "t k"] | None = None,
    backend: str | BackendConfig = "auto",
) -> Routing:
    """Chooses top_k experts a token and weighs them; gradients flow through the weights alone.

    Follows the routers of DeepSeek-V3 (arXiv 2412.19437), Hugging Face's NemotronH, Megatron, Qwen3 and Mixtral; the
    configuration says which.

    Args:
        logits: [T, E].
        config: the router.
        top_k: k.
        bias: [E], added to the selection score only; it gets no gradient.
        scale: [E], a learned factor on the weights.
        routed_scaling_factor: factor on the weights; None takes the config's.
        token_mask: [T]; tokens that are False choose no expert.
        expert_ids: [T, k] of any integer type, the choice to replay; weights are the scores there. A token with
            `ROUTER_DECIDES` among its ids is routed as without them; any other id outside [0, E) is no expert.
        backend: of the experts; it may hold a kernel for the choice, which it does not change.
    """
    chosen = None  # every choice reaches an expert
    if config.selection == "given":
        assert expert_ids is not None, "the layer refuses a call without them"
        ids = int32_ids(expert_ids)
    else:
        ids = checkpoint_name(top_k_ids(selection(logits, bias, config), top_k, backend), CHOICE)
    if expert_ids is not None:
        if config.selection != "given":
            replayed = int32_ids(expert_ids)
            ids = jnp.where(jnp.any(replayed == ROUTER_DECIDES, axis=1, keepdims=True), ids, replayed)
        chosen = (ids >= 0) & (ids < logits.shape[1])
    if token_mask is not None:
        real = jnp.broadcast_to(token_mask[:, None], ids.shape)
        chosen = real if chosen is None else chosen & real
    safe_ids = ids if chosen is None else jnp.where(chosen, ids, 0)
    weights = _weights(logits, safe_ids, chosen, config)
    if scale is not None:
        weights *= _where(chosen, scale.astype(weights.dtype)[safe_ids], 0)
    weights *= config.routed_scaling_factor if routed_scaling_factor is None else routed_scaling_factor
    return Routing(_where(chosen, ids, NO_EXPERT), weights)


def _where(chosen, values, otherwise):
    """The values where a choice reaches an expert; without a mask each does."""
    return values if chosen is None else jnp.where(chosen, values, otherwise)


def scores_of(logits, score_function):
    """Scores of all experts; for softmax_topk the logits, whose softmax over the chosen comes after the choice."""
    if score_function == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if score_function == "sigmoid":
        return jax.nn.sigmoid(logits)
    if score_function == "sqrt_softplus":
        small, logits, small_logits = _split_at_underflow(logits)
        return jnp.where(small, jnp.exp(small_logits / 2), jnp.sqrt(jax.nn.softplus(logits)))
    assert score_function == "softmax_topk"
    return logits


def log_scores(logits, score_function):
    """Logarithms of scores, but for a constant of each token."""
    if score_function == "sigmoid":
        return jax.nn.log_sigmoid(logits)
    if score_function == "sqrt_softplus":
        small, logits, small_logits = _split_at_underflow(logits)
        return jnp.where(small, small_logits, jnp.log(jax.nn.softplus(logits))) / 2
    return logits


def _split_at_underflow(logits):
    """Where log(1 + exp(a)) is exp(a) to the last bit; the logits above, and those below, each with 0 in other places.

    The root of exp(a) is exp(a / 2), which has a slope where exp(a) is 0 already.
    """
    small = logits < math.log(jnp.finfo(logits.dtype).eps)
    return small, jnp.where(small, 0, logits), jnp.where(small, logits, 0)


def _weights(logits, ids, chosen, config):
    """Weights of the chosen, [T, k], before any factor; `chosen` None is all of them."""
    chosen_logits = at_ids(logits, ids)
    eps = config.norm_topk_eps
    if config.score_function == "softmax_topk" or (config.norm_topk_prob and eps == 0):
        # The ratio of scores that have underflowed is still known from their logarithms.
        weights = _masked_softmax(log_scores(chosen_logits, config.score_function), chosen)
        if eps == 0:
            return weights
    elif config.score_function == "softmax":
        weights = _where(chosen, at_ids(jax.nn.softmax(logits, axis=1), ids), 0)
    else:
        weights = _where(chosen, scores_of(chosen_logits, config.score_function), 0)
    if not config.norm_topk_prob:
        return weights
    return _over_sum(weights, eps)


def at_ids(values, ids):
    """values[t, ids[t, j]]; take_along_axis has a gradient that the index checks of checkify cannot read."""
    tokens = jnp.arange(ids.shape[0], dtype=ids.dtype)[:, None]
    return jnp.asarray(values).at[tokens, ids].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _over_sum(scores, eps):
    """The scores divided by their sum and eps; eps is more than 0."""
    # An exact factor: the derivative of a quotient squares its divisor, and 1e-20 squared is no float32 number.
    scores = scores * 2.0**40
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + eps * 2.0**40)


def selection(logits, bias, config):
    """The scores by which experts are chosen: with the bias, and -inf outside the best groups."""
    logits = lax.stop_gradient(logits)
    # Scores alone are in the order of the logits, and logits are still told apart where scores saturate.
    by_logit = config.selection == "logit" or (bias is None and config.num_groups == 1)
    scores = logits if by_logit else scores_of(logits, config.score_function)
    if bias is not None:
        scores = scores + lax.stop_gradient(bias).astype(scores.dtype)[None]
    return _limit_groups(scores, config) if config.num_groups > 1 else scores


def _limit_groups(scores, config):
    """Fills with -inf the scores outside the topk_groups best groups: 0, as some do, can win over a negative score."""
    grouped = scores.reshape(scores.shape[0], config.num_groups, -1)
    group_scores = jnp.sum(lax.top_k(grouped, config.group_score_topk)[0], axis=-1)
    kept = lax.top_k(group_scores, config.topk_groups)[1]
    keep = jnp.any(kept[:, :, None] == jnp.arange(config.num_groups)[None, None], axis=1)
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(scores.shape)


def _masked_softmax(logits, mask):
    if mask is None:
        return jax.nn.softmax(logits, axis=1)
    # A finite fill keeps the softmax of a row without any choice, and its gradient, finite.
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), axis=1), 0)


def auxiliary_losses(
    logits: Float[Array, "b s e"],
    config: RouterConfig,
    top_k: int,
    token_mask: Bool[Array, "b s"] | None = None,
    *,
    all_tokens: Callable[[Array], Array] = lambda values: values,
    sequences_split: bool = False,
    backend: str | BackendConfig = "auto",
) -> dict[str, Float[Array, ""]]:
    """The losses "switch", "sequence" and "z", coefficients applied; 0 where a coefficient is 0.

    switch (Switch Transformers, arXiv 2101.03961, as in Megatron): E / (k T^2) * sum_e n_e sum_t P[t, e] over the T
    unmasked tokens, with P the scores as probabilities and n_e the tokens whose top-k of P holds e (without bias or
    group limits); it equals its coefficient at perfect balance. sequence: the same for each sequence, averaged over
    those with unmasked tokens. z (ST-MoE, arXiv 2202.08906): mean_t logsumexp(logits_t)^2.

    Args:
        logits: [B, S, E], of this device's tokens.
        config: the router.
        top_k: k.
        token_mask: [B, S]; tokens that are False do not count.
        all_tokens: sums a value over the devices that hold the other tokens.
        sequences_split: whether these hold other parts of the same sequences.
        backend: as for `route`.
    """
    imbalance_of = partial(_imbalance, score_function=config.score_function, top_k=top_k, backend=backend)
    mask = jnp.ones(logits.shape[:2], bool) if token_mask is None else token_mask
    losses = {name: jnp.zeros((), logits.dtype) for name in ("switch", "sequence", "z")}
    if config.switch_loss_coef:
        whole_batch = logits.reshape(1, mask.size, logits.shape[2])
        imbalance = imbalance_of(whole_batch, mask.reshape(1, mask.size), all_tokens=all_tokens)
        losses["switch"] = config.switch_loss_coef * jnp.sum(imbalance)
    if config.sequence_loss_coef:
        within, between = (all_tokens, lambda n: n) if sequences_split else (lambda n: n, all_tokens)
        imbalance = imbalance_of(logits, mask, all_tokens=within)
        real = imbalance.size if token_mask is None else jnp.sum(within(jnp.sum(mask, axis=1)) > 0)
        sequences = between(jnp.full((), real))
        losses["sequence"] = (
            config.sequence_loss_coef * between(jnp.sum(imbalance)) / _at_least_one(sequences, imbalance)
        )
    if config.z_loss_coef:
        squared = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0)
        losses["z"] = (
            config.z_loss_coef * all_tokens(jnp.sum(squared)) / _at_least_one(all_tokens(jnp.sum(mask)), squared)
        )
    return losses


def _at_least_one(count, like):
    return jnp.maximum(count, 1).astype(like.dtype)


def _probabilities(logits, score_function):
    if score_function in ("softmax", "softmax_topk"):
        return jax.nn.softmax(logits, axis=-1)
    return _over_sum(scores_of(logits, score_function), 1e-20)


def _imbalance(
    logits: Float[Array, "b s e"], mask: Bool[Array, "b s"], *, score_function, top_k, all_tokens, backend
) -> Float[Array, " b"]:
    """E / (k T^2) * sum_e n_e sum_t P[t, e] of each sequence, which all_tokens completes; 0 for one without tokens."""
    batch, length, num_experts = logits.shape
    probs = jnp.where(mask[..., None], _probabilities(logits, score_function), 0)
    ids = top_k_ids(lax.stop_gradient(logits).reshape(-1, num_experts), top_k, backend).reshape(batch, length, top_k)
    offset = num_experts * jnp.arange(batch)[:, None, None]
    ids = jnp.where(mask[..., None], checkpoint_name(ids, CHOICE) + offset, NO_EXPERT)
    counts = all_tokens(count_experts(ids, batch * num_experts, backend).reshape(batch, num_experts))
    tokens = _at_least_one(all_tokens(jnp.sum(mask, axis=1)), probs)
    return (
        jnp.sum(counts.astype(probs.dtype) * all_tokens(jnp.sum(probs, axis=1)), axis=1)
        * num_experts
        / (top_k * tokens**2)
    )


def update_correction_bias(
    bias: Float[Array, "*layers e"],
    tokens_per_expert: Int[Array, "*layers e"],
    rate: float | Float[Array, ""],
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> Float[Array, "*layers e"]:
    """b_e + rate * sign(mean(n) - n_e): raises the bias of experts with few tokens (DeepSeek-V3, arXiv 2412.19437).

    Call it after the optimiser's step, outside of autodiff, with the counts of the whole batch (summed over devices).

    Args:
        bias: [..., E] float32; axes before the last are layers.
        tokens_per_expert: [..., E] integers, as in `LatentMoEAux`; every count is told from the mean, however large.
        rate: the step, `RouterConfig.bias_update_rate`.
        recentre: subtract the mean over experts afterwards. It never changes a choice, and keeps the biases where
            float32 is finest.
        axis_name: mapped axes over which the counts are to be summed first.

    Returns:
        [..., E] float32.

    Raises:
        InputError: the counts are no integers, or not of the bias's shape.
    """
    bias, counts = jnp.asarray(bias), jnp.asarray(tokens_per_expert)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise InputError(f"tokens_per_expert of dtype {counts.dtype} must be integers: counts, not means or shares.")
    if counts.shape != bias.shape:
        raise InputError(f"tokens_per_expert of shape {counts.shape} must be of the bias's shape {bias.shape}.")
    counts = counts if counts.dtype.itemsize >= 4 else counts.astype(jnp.int32)
    counts = counts if axis_name is None else lax.psum(counts, axis_name)
    moved = bias.astype(jnp.float32) + rate * _sign_of_mean_minus(counts).astype(jnp.float32)
    return moved - jnp.mean(moved, axis=-1, keepdims=True) if recentre else moved


def _sign_of_mean_minus(counts):
    """sign(mean(n) - n_e) without rounding: float32 cannot tell 2^24 from one more, and sums may pass 2^31."""
    experts = counts.shape[-1]
    rest = jnp.sum(counts % experts, axis=-1, keepdims=True)
    mean = jnp.sum(counts // experts, axis=-1, keepdims=True) + rest // experts
    rest %= experts  # the mean is mean + rest / experts
    return jnp.where(counts > mean, -1, jnp.where((counts == mean) & (rest == 0), 0, 1))
