"""The latent mixture-of-experts layer, top to bottom, as one pure function."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from jax_latent_moe.arrays import typed_key
from jax_latent_moe.codes import checked_codes
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.derivatives import refused_if_differentiated
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.experts import encoded, flat, routed_experts
from jax_latent_moe.formats import row_multiple_of
from jax_latent_moe.inputs import check_inputs, check_whole, small_ids
from jax_latent_moe.limits import keep_rounded, keep_within_capacity, padded_experts, rows_to_compute
from jax_latent_moe.low_rank import LowRank, base_of, cast, projected
from jax_latent_moe.one_token import OneToken, Routed, next_projection, plan_token, routed_token
from jax_latent_moe.parallel.copies import choose_copies
from jax_latent_moe.parallel.exchange import exchange, own_experts_of_all
from jax_latent_moe.parallel.mesh import CODES, in_auto_mode, over_mesh
from jax_latent_moe.params import Params, as_array, check_config, check_params
from jax_latent_moe.precision import Codes
from jax_latent_moe.projections import projection, projections
from jax_latent_moe.routing.expert_sort import count_experts
from jax_latent_moe.routing.jitter import jittered
from jax_latent_moe.routing.losses import auxiliary_losses
from jax_latent_moe.routing.permute import make_dispatch_plan
from jax_latent_moe.routing.quantile import target_bias
from jax_latent_moe.routing.rounding import with_next_choices
from jax_latent_moe.routing.router import (
    CHOICE,
    NO_EXPERT,
    Routing,
    choice_scores,
    route,
    router_logits,
    router_logits_and_projection,
)
from jax_latent_moe.shards import ONE_DEVICE
from jax_latent_moe.shared_expert import shared_expert

LATENT = "latent_moe_latent"


class LatentMoEAux(NamedTuple):
    """The routing of one call, and its auxiliary losses.

    Attributes:
        expert_ids: [..., k] int32, the chosen experts, -1 for none. Pass it as `expert_ids` to replay the choice.
        weights: [..., k] float32, their combine weights.
        tokens_per_expert: [E] int32, tokens that chose each expert on all devices, before capacity drops any.
        dropped_per_expert: [E] int32, how many of them the router's capacity or the dispatch's capacity dropped.
        losses: the auxiliary losses "switch", "sequence" and "z", coefficients applied; with router.global_loss_coef
            also "global".
        global_counts: [E] int32, with router.global_loss_coef: the counts of the step's microbatches so far, this one
            included. Pass it as `global_counts` with the next microbatch. None without that coefficient.
        bias_target: [E] float32, with router.bias_update="quantile": the bias that would balance the loads, which
            `after_step` reads. None otherwise.
    """

    expert_ids: Int[Array, "*batch k"]
    weights: Float[Array, "*batch k"]
    tokens_per_expert: Int[Array, " e"]
    dropped_per_expert: Int[Array, " e"]
    losses: dict[str, Float[Array, ""]]
    global_counts: Int[Array, " e"] | None = None
    bias_target: Float[Array, " e"] | None = None


class _ByToken(NamedTuple):
    """Optional arguments whose leading axes are those of x. `numbers` counts the tokens of x, for jitter."""

    token_mask: Bool[Array, "*batch"] | None
    expert_ids: Int[Array, "*batch k"] | None
    segment_ids: Int[Array, "*batch"] | None
    numbers: Int[Array, "*batch"] | None = None


class _Whole(NamedTuple):
    """Optional arguments that every device has whole."""

    global_counts: Int[Array, " e"] | None
    key: Key[Array, ""] | None


def latent_moe(
    params: Params,
    x: Float[Array, "*batch d"],
    config: LatentMoEConfig,
    *,
    token_mask: Bool[Array, "*batch"] | None = None,
    expert_ids: Int[Array, "*batch k"] | None = None,
    segment_ids: Int[Array, "*batch"] | None = None,
    global_counts: Int[Array, " e"] | None = None,
    key: Key[Array, ""] | None = None,
    codes: Codes | None = None,
) -> tuple[Float[Array, "*batch d"], LatentMoEAux]:
    """Computes y = up_proj(sum_j weight_j expert_j(down_proj(x))) + shared(x), routed by x (arXiv 2601.18089).

    With config.shared_expert_gate, shared(x) is multiplied by sigmoid(x @ gate) (arXiv 2407.10671, section 2.2.2).

    With config.parallel, the layer is spread over the mesh that `jax.set_mesh` set: see `jax_latent_moe.parallel`.

    Args:
        params: as `init_params` makes them.
        x: [..., d], a floating array, or a value that NumPy turns into one. The router reads it in its own dtype, the
            rest of the layer in config.dtype. The axis before the last one is the sequence.
        config: the layer; static under jit.
        token_mask: [...]. A token that is False takes part in nothing, and its output is zero. Its values, and the
            gradient of its output, may be anything.
        expert_ids: [..., k] integers, a choice to replay. Weights and gradients come from the scores at these ids. -1
            reaches no expert. The router routes a token that has -2 among its ids.
        segment_ids: [...] integers, for packed sequences. The tokens of a sequence with equal ids are a document, and
            the sequence loss treats each document as a sequence. Nothing else reads it: mark padding with token_mask.
        global_counts: [E] integers, the `LatentMoEAux.global_counts` of the step's microbatch before this one, for
            router.global_loss_coef. None starts a step.
        key: a JAX key for router.input_jitter. Without it the layer does not jitter, and it cannot be differentiated.
        codes: `encode_experts(params, config)` of these params, for config.precision. Gradients go to params. None
            encodes the weights in this call. Codes of other weights, such as those before an optimiser's step, give
            NaN.

    Returns:
        y: [..., d] in config.dtype.
        aux: `LatentMoEAux`.

    Raises:
        InputError: the parameters, the codes or an array do not fit the config, or a layer with router.input_jitter is
            differentiated without a key.
        ConfigError: an axis of the mesh does not divide what it splits.
        UnsupportedError: the named backend, or the named dispatch, cannot run this layer.
    """
    check_config(config)
    params = check_params(params, config)
    x = as_array("x", x)
    by_token = _ByToken(*map(as_array, _ByToken._fields[:3], (token_mask, expert_ids, segment_ids)))
    counts = as_array("global_counts", global_counts)
    check_inputs(x, config, by_token)
    check_whole(config, counts, key)
    if codes is not None:
        params = params | {CODES: checked_codes(codes, params, config)._asdict()}
    key = None if key is None else typed_key(key)
    by_token = by_token._replace(segment_ids=small_ids(by_token.segment_ids))
    x, by_token, counts = jax.tree.map(jnp.asarray, (x, by_token, counts))
    if key is not None:
        by_token = by_token._replace(numbers=jnp.arange(math.prod(x.shape[:-1])).reshape(x.shape[:-1]))
    layer = partial(_layer, config)
    run = partial(layer, ONE_DEVICE) if config.parallel is None else partial(over_mesh, layer, config)
    outputs, totals = in_auto_mode(run, params, x, by_token, _Whole(counts, key))
    y, chosen_ids, weights = outputs
    if config.router.input_jitter and key is None:
        y = refused_if_differentiated(_WITHOUT_KEY.format(config.router.input_jitter), y)
    return y, LatentMoEAux(chosen_ids, weights, *totals)


_WITHOUT_KEY = (
    "router.input_jitter={} needs a key in training: give latent_moe a key, the linen module an rng 'jitter' or the "
    "nnx module rngs, or set input_jitter to 0."
)


def _layer(config, shards, params, x, by_token, whole):
    """The layer on one device's tokens, experts and inner widths.

    Returns the outputs that are split as x is, and the outputs that are equal on all devices.
    """
    batch, tokens = x.shape[:-1], x.reshape(-1, config.hidden_size)
    mask = None if by_token.token_mask is None else by_token.token_mask.reshape(-1)
    if mask is not None:
        tokens = jnp.where(mask[:, None], tokens, 0)

    logits, routing, combined, dropped = _routed_part(config, shards, params, tokens, mask, by_token, whole.key)
    tokens = tokens.astype(config.dtype)
    # Without a norm before y, the partial sums of the routed and the shared experts are added once, in y.
    sum_in_y = "shared" in params and config.latent_norm != "post"
    if not sum_in_y:
        combined = shards.sum_over_tensor(combined)
    if config.latent_norm == "post":
        combined = _rms_norm(combined, params["latent_norm"]["scale"], config.latent_norm_eps)
    if config.apply_routed_scale_to_output:
        combined *= config.router.routed_scaling_factor
    at_full_width = config.latent_size is None or next_projection(config, params) is not None
    y = combined if at_full_width else _project(combined, params["up_proj"], config)
    if "shared" in params:
        shared = shared_expert(tokens, params["shared"], config)
        y = shards.sum_over_tensor(y + shared) if sum_in_y else y + shards.sum_over_tensor(shared)
    if mask is not None:  # y is zero there already; this stops the gradient of padding
        y = jnp.where(mask[:, None], y, 0)

    sequences = (math.prod(batch[:-1]), batch[-1] if batch else 1)
    losses, counts = auxiliary_losses(
        logits.reshape(*sequences, config.num_experts),
        config.router,
        config.top_k,
        None if mask is None else mask.reshape(sequences),
        segment_ids=None if by_token.segment_ids is None else by_token.segment_ids.reshape(sequences),
        global_counts=whole.global_counts,
        shards=shards,
        backend=config.backend,
    )
    outputs = (y.reshape(x.shape), *(part.reshape(*batch, config.top_k) for part in routing[:2]))
    load = count_experts(routing.expert_ids, config.num_experts, config.backend)
    target = None
    if config.router.bias_update == "quantile":
        choice = choice_scores(logits, config.router, biased=True)
        target = target_bias(choice, params["router"]["bias"], config.top_k, mask, shards.sum_over_tokens)
    return outputs, (shards.sum_over_tokens(load), shards.sum_over_tokens(dropped), losses, counts, target)


def _routed_part(config, shards, params, tokens, mask, by_token, key):
    """Router, choice and experts: in one call if it can run. Returns what `_in_separate_calls` does."""
    plan = None
    if mask is None and by_token.expert_ids is None and key is None:
        plan = plan_token(config, tokens.shape[0], tokens.dtype, params)
    if not isinstance(plan, OneToken):
        return _in_separate_calls(config, shards, params, tokens, mask, by_token, key)
    usual = partial(_usual_token, config)
    logits, expert_ids, weights, combined = routed_token(plan, config, usual, params, tokens)
    return logits, Routing(expert_ids, weights), combined, jnp.zeros(config.num_experts, jnp.int32)


def _usual_token(config, params, tokens):
    nothing = _ByToken(None, None, None)
    logits, routing, combined, _ = _in_separate_calls(config, ONE_DEVICE, params, tokens, None, nothing, None)
    return Routed(logits, routing.expert_ids, routing.weights, combined)


def _in_separate_calls(config, shards, params, tokens, mask, by_token, key):
    """The router's logits, the choice, the combined experts, and how many assignments were dropped of each [E].

    The combined experts are [T, l], or [T, d] with `next_projection`.
    """
    router = params["router"]
    router_dtype = config.router.dtype
    if key is not None:
        noisy = jittered(tokens, key, config.router.input_jitter, by_token.numbers.reshape(-1))
        logits = router_logits(noisy, router["kernel"], router_dtype)
        latent = tokens.astype(config.dtype)
        latent = latent if config.latent_size is None else _project(latent, params["down_proj"], config)
    else:
        down = None if config.latent_size is None else cast(params["down_proj"]["kernel"], config.dtype)
        base = None if down is None else base_of(down)
        usual = partial(router_logits_and_projection, dtype=router_dtype)
        logits, latent = projections(config, usual, tokens, router["kernel"], base)
        if down is None:
            latent = tokens.astype(config.dtype)
        elif isinstance(down, LowRank):
            latent += projected(tokens.astype(config.dtype), down)
    if config.router.logit_bias:
        logits += router["logit_bias"].astype(logits.dtype)[None]
    routing = route(
        logits,
        config.router,
        config.top_k,
        bias=router.get("bias"),
        scale=router.get("scale"),
        routed_scaling_factor=1.0 if config.apply_routed_scale_to_output else None,
        token_mask=mask,
        expert_ids=None if by_token.expert_ids is None else by_token.expert_ids.reshape(-1, config.top_k),
        all_tokens=shards.sum_over_tokens,
        backend=config.backend,
    )

    if config.latent_norm == "pre":
        latent = _rms_norm(latent, params["latent_norm"]["scale"], config.latent_norm_eps)
    latent = checkpoint_name(latent, LATENT)
    assignments = routing
    if config.router.round_to_tile is not None:
        factor = 1.0 if config.apply_routed_scale_to_output else config.router.routed_scaling_factor
        assignments = with_next_choices(
            logits,
            routing,
            config.router,
            bias=router.get("bias"),
            scale=router.get("scale"),
            factor=factor,
            backend=config.backend,
        )
    combined, dropped = _route_through_experts(
        params["experts"], params.get(CODES), latent, assignments, config, shards, next_projection(config, params)
    )
    return logits, routing, combined, dropped


def _route_through_experts(params, codes, latent, routing, config, shards, up_proj):
    """The weighted sum of the experts' outputs [T, l], and how many of these tokens' assignments were dropped [E].

    With up_proj, its product with the sum [T, d] instead.
    """
    expert_ids, weights, log_weights = routing
    capacity = None
    dropped = jnp.zeros(config.num_experts, jnp.int32)
    if config.router.capacity_factor is not None:
        kept, capacity = keep_within_capacity(expert_ids, weights, config, shards)
        kept = checkpoint_name(kept, CHOICE)
        dropped_ids = jnp.where(kept, NO_EXPERT, expert_ids)
        dropped = count_experts(dropped_ids, config.num_experts, config.backend)
        expert_ids, weights = jnp.where(kept, expert_ids, NO_EXPERT), jnp.where(kept, weights, 0)
        log_weights = None if log_weights is None else jnp.where(kept, log_weights, 0)
    if config.router.round_to_tile is not None:
        kept = keep_rounded(expert_ids, weights, config, shards)
        own = jnp.where(kept, NO_EXPERT, expert_ids)[:, : config.top_k]
        dropped = count_experts(own, config.num_experts, config.backend)
        expert_ids, weights = jnp.where(kept, expert_ids, NO_EXPERT), jnp.where(kept, weights, 0)
    if config.apply_probs_on_input:
        latent = (latent.astype(weights.dtype) * weights).astype(latent.dtype)
        weights, log_weights = (expert_ids != NO_EXPERT).astype(weights.dtype), None

    copies = None if config.parallel is None else config.parallel.physical_to_logical
    if copies is not None:
        expert_ids = choose_copies(expert_ids, copies, shards.token_index(), config.backend)

    w_in, w_out = params["w_in"], params["w_out"]
    if codes is not None:
        codes = Codes(**codes)
    elif config.precision is not None and not isinstance(w_in, LowRank) and not isinstance(w_out, LowRank):
        codes = encoded(config, flat(w_in), w_out)
    w_in, w_out = cast(w_in, config.dtype), cast(w_out, config.dtype)
    biases = None
    if config.expert_bias:
        b_in, b_out = (params[name].astype(config.dtype) for name in ("b_in", "b_out"))
        biases = b_in, shards.once_over_tensor(b_out)

    row_multiple = row_multiple_of(base_of(w_in), base_of(w_out))

    def compute(weights_of_experts, latent, weights, plan, log_weights=None):
        w_in, w_out, biases, codes = weights_of_experts
        return routed_experts(config, latent, weights, w_in, w_out, plan, biases, codes, log_weights, up_proj)

    weights_of_experts = w_in, w_out, biases, codes
    experts = partial(compute, weights_of_experts)
    if config.router.pad_to_capacity:
        return padded_experts(experts, latent, expert_ids, weights, config, capacity, row_multiple), dropped
    if shards.expert_axis is None:
        plan = make_dispatch_plan(expert_ids, config.num_physical_experts, config.backend, row_multiple)
        return experts(latent, weights, rows_to_compute(plan, config), log_weights), dropped
    routed = {
        "axis": shards.expert_axis,
        "compute": compute,
        "weights_of_experts": weights_of_experts,
        "latent": latent,
        "expert_ids": expert_ids,
        "weights": weights,
        "row_multiple": row_multiple,
    }
    if not shards.token_axes:
        return own_experts_of_all(config, **routed), dropped
    combined, not_sent = exchange(config, **routed)
    if copies is not None:
        not_sent = jnp.zeros_like(dropped).at[np.asarray(copies)].add(not_sent)
    return combined, dropped + not_sent


def _project(x: Float[Array, "t a"], params, config) -> Float[Array, "t b"]:
    kernel = cast(params["kernel"], x.dtype)
    out = projection(config, x, base_of(kernel))
    return out + projected(x, kernel) if isinstance(kernel, LowRank) else out


def _rms_norm(x: Float[Array, "t l"], scale: Float[Array, " l"], eps: float) -> Float[Array, "t l"]:
    wide = x.astype(at_least_float32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(wide.dtype)[None]).astype(x.dtype)
