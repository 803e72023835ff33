"""The experts that each token reaches, and their weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import RouterConfig
from jax_latent_moe.decode import MOST_LISTED, MOST_TOKENS_OF_CODES, refusal
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.routing.expert_sort import int32_ids
from jax_latent_moe.routing.scores import log_scores, over_sum, scaled_and_sum, scores
from jax_latent_moe.routing.sinkhorn import balanced_scores
from jax_latent_moe.routing.split_matmul import split_matmul, split_matmul_beside
from jax_latent_moe.routing.top_k import (
    MOST_SCORES,
    MOST_WEIGHTS,
    compiled_top_k_and_weights,
    compiled_top_k_ids,
    top_k_ids,
)

NO_EXPERT = -1
"""In a routing to replay: this assignment reaches no expert."""

ROUTER_DECIDES = -2
"""In a routing to replay: the router chooses all experts of a token that holds this id."""

CHOICE = "latent_moe_choice"
"""The checkpoint name of every discrete choice: of experts, for the losses' counts, and of what capacity keeps."""

_save_choice = jax.checkpoint_policies.save_only_these_names(CHOICE)


def pin_choice(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """A policy of `jax.checkpoint` that saves only the choices, so that recomputation routes like the forward pass."""
    return _save_choice(primitive, *arguments, **parameters)


class Routing(NamedTuple):
    """The choice of each token.

    Attributes:
        expert_ids: [T, k] int32, `NO_EXPERT` for an assignment without an expert.
        weights: [T, k] float32 (float64 in a float64 router), 0 for an assignment without an expert.
        log_weights: [T, k], an array that takes the gradients of the weights' logarithms: see `experts.routed_experts`.
            Its values are those of weights. None if the router has a learned factor, which needs the weights' own
            gradients, or if the weights depend on logits that were not chosen.
    """

    expert_ids: Int[Array, "t k"]
    weights: Float[Array, "t k"]
    log_weights: Float[Array, "t k"] | None = None


def router_logits(x: Float[Array, "t d"], kernel: Float[Array, "d e"], dtype: str) -> Float[Array, "t e"]:
    """Logits x @ kernel, with operands in `dtype`, accumulated and returned in at least float32, never in tf32.

    For bfloat16 tokens on a GPU, the backward pass rounds the gradients of the logits: see `split_matmul`.
    """
    if _splits(x, dtype):
        return split_matmul(x, kernel)
    wide = at_least_float32(dtype)
    return jnp.matmul(
        x.astype(dtype), kernel.astype(dtype), precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )


def router_logits_and_projection(
    x: Float[Array, "t d"], kernel: Float[Array, "d e"], projection: Float[Array, "d l"] | None, *, dtype: str
) -> tuple[Float[Array, "t e"], Float[Array, "t l"] | None]:
    """`router_logits`, and x @ projection in the projection's type, None without a projection."""
    if projection is None:
        return router_logits(x, kernel, dtype), None
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
    all_tokens: Callable[[Array], Array] = lambda values: values,
    backend: str | BackendConfig = "auto",
) -> Routing:
    """Chooses top_k experts for each token and computes their weights. Gradients flow only through the weights.

    The configuration selects among the routers of DeepSeek-V3 (arXiv 2412.19437), Hugging Face's NemotronH, Megatron,
    Qwen3 and Mixtral.

    Args:
        logits: [T, E].
        config: the router.
        top_k: k.
        bias: [E], added to the selection score only. It gets no gradient.
        scale: [E], a learned factor on the weights.
        routed_scaling_factor: factor on the weights; None takes the config's.
        token_mask: [T]; tokens that are False choose no expert.
        expert_ids: [T, k] of any integer type, the choice to replay. The weights come from the scores at these ids. The
            router routes a token with `ROUTER_DECIDES` among its ids. Any other id outside [0, E) is no expert.
        all_tokens: sums a value over the devices that hold the other tokens. Only selection="sinkhorn" reads it.
        backend: the experts' backend. If it has a kernel for the choice, that kernel runs; the choice is the same.
    """
    chosen = None  # every assignment reaches an expert
    if config.selection == "given":
        assert expert_ids is not None, "the layer refuses a call without them"
        ids = int32_ids(expert_ids)
    else:
        choice = selection(logits, bias, config, token_mask, all_tokens)
        plain = token_mask is None and expert_ids is None and scale is None
        float32 = choice.dtype == logits.dtype == jnp.float32
        if plain and float32 and weighs_in_kernel(config, choice.shape[0], choice.shape[1], top_k, backend):
            factor = config.routed_scaling_factor if routed_scaling_factor is None else routed_scaling_factor
            return Routing(*_chosen(config, top_k, factor, choice, logits))
        ids = checkpoint_name(top_k_ids(choice, top_k, backend), CHOICE)
    if expert_ids is not None:
        if config.selection != "given":
            replayed = int32_ids(expert_ids)
            ids = jnp.where(jnp.any(replayed == ROUTER_DECIDES, axis=1, keepdims=True), ids, replayed)
        chosen = (ids >= 0) & (ids < logits.shape[1])
    if token_mask is not None:
        real = jnp.broadcast_to(token_mask[:, None], ids.shape)
        chosen = real if chosen is None else chosen & real
    safe_ids = ids if chosen is None else jnp.where(chosen, ids, 0)
    weights, chosen_logits = _weights(logits, safe_ids, chosen, config)
    if scale is not None:
        weights *= _where(chosen, scale.astype(weights.dtype)[safe_ids], 0)
    weights *= config.routed_scaling_factor if routed_scaling_factor is None else routed_scaling_factor
    logs = None
    if scale is None and gives_log_weights(config):
        logs = _log_weights(config, weights, chosen_logits, chosen)
    return Routing(_where(chosen, ids, NO_EXPERT), weights, logs)


def gives_log_weights(config: RouterConfig) -> bool:
    """Whether `route` gives `Routing.log_weights`: the logarithms depend on the chosen logits alone."""
    return not config.per_expert_scale and (config.score_function != "softmax" or _over_chosen(config))


def weighs_in_kernel(
    config: RouterConfig, tokens: Any, num_experts: int, top_k: int, backend, device: Device | None = None
) -> bool:
    """Whether one compiled kernel makes the choice of few tokens and its weights, if the logits are float32.

    It does so for a call without mask, replayed choice and learned scale, and `route` then gives no `log_weights`.

    Args:
        config: the router.
        tokens: T, an integer unless it is a symbolic size of `jax.export`.
        num_experts: E.
        top_k: k.
        backend: the experts' backend.
        device: the device that runs it; None is JAX's default device.
    """
    normalised = config.norm_topk_prob or config.score_function == "softmax_topk"
    by_sum = config.norm_topk_prob and config.norm_topk_eps > 0
    known = config.score_function == "sigmoid" or (not by_sum and config.score_function != "sqrt_softplus")
    fits = num_experts <= MOST_SCORES and top_k <= MOST_WEIGHTS
    few = refusal(backend, tokens, top_k, device, MOST_TOKENS_OF_CODES, MOST_LISTED) is None
    return normalised and fits and known and few


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chosen(config, top_k, factor, choice, logits):
    """The choice by the scores `choice`, and its weights, in one kernel if there is no gradient."""
    return compiled_top_k_and_weights(
        choice,
        logits,
        top_k,
        sigmoid=config.score_function == "sigmoid",
        eps=config.norm_topk_eps if config.norm_topk_prob else 0.0,
        factor=factor,
    )


def _chosen_fwd(config, top_k, factor, choice, logits):
    ids = checkpoint_name(compiled_top_k_ids(choice, top_k), CHOICE)
    weights, pullback = jax.vjp(lambda logits: _weights(logits, ids, None, config)[0] * factor, logits)
    return (ids, weights), pullback


def _chosen_bwd(config, top_k, factor, pullback, cotangents):
    del config, top_k, factor
    return None, *pullback(cotangents[1])


_chosen.defvjp(_chosen_fwd, _chosen_bwd)


def _where(chosen, values, otherwise):
    """The values of assignments with an expert, and `otherwise` elsewhere. Without a mask, all have an expert."""
    return values if chosen is None else jnp.where(chosen, values, otherwise)


def _weights(logits, ids, chosen, config):
    """The weights [T, k] before any factor, 0 where `chosen` is False (None: all True), and the logits at `ids`."""
    chosen_logits = at_ids(logits, ids)
    if config.score_function == "softmax" and not _over_chosen(config):
        values = _where(chosen, at_ids(jax.nn.softmax(logits, axis=1), ids), 0)
    else:
        values = _values(chosen_logits, chosen, config)
    eps = config.norm_topk_eps
    return over_sum(values, eps) if config.norm_topk_prob and eps > 0 else values, chosen_logits


def _over_chosen(config) -> bool:
    return config.score_function == "softmax_topk" or (config.norm_topk_prob and config.norm_topk_eps == 0)


def _values(chosen_logits, chosen, config):
    """The weights, before they are divided by their sum plus an epsilon, if they depend only on the chosen logits."""
    if _over_chosen(config):
        # Logarithms still give the ratio of scores that have underflowed.
        return _masked_softmax(log_scores(chosen_logits, config.score_function), chosen)
    return _where(chosen, scores(chosen_logits, config.score_function), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_weights(config, weights, chosen_logits, chosen):
    """`Routing.log_weights`. The forward pass computes no logarithm."""
    del config, chosen_logits, chosen
    return weights


def _log_weights_fwd(config, weights, chosen_logits, chosen):
    del config
    return weights, (chosen_logits, chosen)


def _log_weights_bwd(config, residuals, gradients):
    chosen_logits, chosen = residuals
    _, pullback = jax.vjp(lambda logits: _logarithms(logits, chosen, config), chosen_logits)
    return None, *pullback(_where(chosen, gradients, 0)), None


_log_weights.defvjp(_log_weights_fwd, _log_weights_bwd)


def _logarithms(chosen_logits, chosen, config):
    """The logarithms of `_weights` where `chosen` is True, up to a constant for all."""
    logs, eps = log_scores(chosen_logits, config.score_function), config.norm_topk_eps
    if _over_chosen(config):
        logs = jax.nn.log_softmax(_where(chosen, logs, jnp.finfo(logs.dtype).min), axis=1)
    if not config.norm_topk_prob or eps == 0:
        return logs
    # XLA computes this sum once for both passes, because it is written as in `_weights`.
    return logs - jnp.log(scaled_and_sum(_values(chosen_logits, chosen, config), eps)[1])


def at_ids(values, ids):
    """values[t, ids[t, j]]. checkify's index checks fail in the gradient of jnp.take_along_axis."""
    tokens = jnp.arange(ids.shape[0], dtype=ids.dtype)[:, None]
    return jnp.asarray(values).at[tokens, ids].get(mode="promise_in_bounds", wrap_negative_indices=False)


def selection(logits, bias, config, token_mask=None, all_tokens=lambda values: values) -> Float[Array, "t e"]:
    """The scores that decide the choice: with the bias, and -inf outside the best groups."""
    if config.selection == "sinkhorn":
        return balanced_scores(logits, token_mask, all_tokens)
    choice = choice_scores(lax.stop_gradient(logits), config, biased=bias is not None)
    if bias is not None:
        choice = choice + lax.stop_gradient(bias).astype(choice.dtype)[None]
    return _limit_groups(choice, config) if config.num_groups > 1 else choice


def choice_scores(logits: Float[Array, "t e"], config: RouterConfig, biased: bool) -> Float[Array, "t e"]:
    """The scores of the choice before the bias: the score function's values, or the logits."""
    # Without a bias, logits have the order of the scores, and they still differ where scores saturate.
    by_logit = config.selection == "logit" or (not biased and config.num_groups == 1)
    return logits if by_logit else scores(logits, config.score_function)


def _limit_groups(selection, config):
    """Sets the scores outside the topk_groups best groups to -inf. 0 would not do: it exceeds a negative score."""
    grouped = selection.reshape(selection.shape[0], config.num_groups, -1)
    group_scores = jnp.sum(lax.top_k(grouped, config.group_score_topk)[0], axis=-1)
    kept = lax.top_k(group_scores, config.topk_groups)[1]
    keep = jnp.any(kept[:, :, None] == jnp.arange(config.num_groups)[None, None], axis=1)
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(selection.shape)


def _masked_softmax(logits, mask):
    if mask is None:
        return jax.nn.softmax(logits, axis=1)
    # With a finite fill, the softmax of a row without any choice is finite, and so is its gradient.
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), axis=1), 0)
