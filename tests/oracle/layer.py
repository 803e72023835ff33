"""The whole layer, one token at a time, and its gradients, in float64."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from tests.oracle.activations import mlp, mlp_backward, sigmoid
from tests.oracle.losses import losses
from tests.oracle.rounding import Rounding
from tests.oracle.rounding import weights as encoded_weights
from tests.oracle.router import choose, choose_balanced, gap, next_choices, sinkhorn, weigh, weigh_backward


class Result(NamedTuple):
    """The layer's results, and the values for `backward`.

    `margin` is the least distance of any discrete choice (experts, groups, drops) to another one: comparing ids with
    another precision only makes sense where it is well above that precision's rounding. `rounding.margin` is the same
    of operands in FP8; `backward` takes those of its own into it.
    """

    y: np.ndarray
    expert_ids: np.ndarray
    weights: np.ndarray
    tokens_per_expert: np.ndarray
    dropped_per_expert: np.ndarray
    losses: dict
    margin: float
    tape: Any
    rounding: Rounding
    global_counts: np.ndarray | None = None


def rms_norm(row, scale, eps):
    inverse = 1 / math.sqrt(np.mean(row**2) + eps)
    return row * inverse * scale, (row, inverse)


def rms_norm_backward(saved, scale, dout):
    row, inverse = saved
    dscale = dout * row * inverse
    scaled = dout * scale
    return inverse * scaled - row * inverse**3 * np.mean(scaled * row), dscale


def keep_rows(config, ids, weights):
    """Which routed rows [T, k] stay within capacity, and the margin of that choice."""
    router, (tokens, k) = config.router, ids.shape
    keep, margin = ids >= 0, np.inf
    if router.capacity_factor is None:
        return keep, margin
    rows = Fraction(Decimal(str(router.capacity_factor))) * tokens * k / config.num_experts
    capacity = max(router.min_capacity, math.ceil(rows))
    for e in range(config.num_experts):
        rows = [(t, j) for t in range(tokens) for j in range(k) if ids[t, j] == e]
        if router.drop_policy == "probs":
            margin = min(margin, gap([weights[row] for row in rows], capacity))
            rows.sort(key=lambda row: -weights[row])
        for row in rows[capacity:]:
            keep[row] = False
    return keep, margin


def keep_tiles(config, ids, weights):
    """Which assignments [T, k + c] fill tiles, own choices first, and the margin of that choice.

    An expert's number of own choices goes to the nearest multiple of the tile, a half up; down if it lacks tokens.
    """
    tile, keep, margin = config.router.round_to_tile, np.zeros(ids.shape, bool), np.inf
    for e in range(config.num_experts):
        rows = sorted(np.argwhere(ids == e).tolist(), key=lambda row: (row[1] >= config.top_k, -weights[tuple(row)]))
        own = sum(j < config.top_k for _, j in rows)
        wanted = (2 * own + tile) // (2 * tile) * tile
        if wanted > len(rows):
            wanted = own // tile * tile
        values = [weights[t, j] for t, j in rows]
        margin = min(margin, gap(values[:own], wanted), gap(values[own:], wanted - own))
        for row in rows[:wanted]:
            keep[tuple(row)] = True
    return keep, margin


def forward(
    params,
    x,
    config,
    token_mask=None,
    expert_ids=None,
    segment_ids=None,
    global_counts=None,
    jitter=None,
    rounding=None,
) -> Result:
    """The layer on x [..., d], float64 arrays in and out.

    jitter is the factors of the router's input, like x. rounding is what rounds operands in FP8.
    """
    k, experts, width = config.top_k, config.num_experts, config.latent_width
    leading = x.shape[:-1]
    flat = x.reshape(-1, config.hidden_size)
    tokens = len(flat)
    mask = np.ones(tokens, bool) if token_mask is None else np.asarray(token_mask).reshape(-1)
    flat = np.where(mask[:, None], flat, 0.0)
    factors = np.ones_like(flat) if jitter is None else jitter.reshape(flat.shape)
    logits = (flat * factors) @ params["router"]["kernel"]
    if config.router.logit_bias:
        logits = logits + params["router"]["logit_bias"]
    balanced, ended = sinkhorn(logits, mask) if config.router.selection == "sinkhorn" else (None, True)
    bias = params["router"]["bias"] if config.router.correction_bias else np.zeros(experts)
    expert_scale = params["router"]["scale"] if config.router.per_expert_scale else np.ones(experts)

    ids, weights, saved_weights = np.full((tokens, k), -1), np.zeros((tokens, k)), [None] * tokens
    margin = np.inf
    for t in range(tokens):
        if not mask[t]:
            continue
        replayed = None if expert_ids is None else np.asarray(expert_ids).reshape(-1, k)[t]
        if replayed is None or (-2 in replayed and config.router.selection != "given"):
            if balanced is None:
                ids[t], token_margin = choose(config, logits[t], bias)
            else:
                ids[t], token_margin = choose_balanced(config, balanced[t], ended)
            margin = min(margin, token_margin)
        else:
            ids[t] = replayed
        weights[t], saved_weights[t] = weigh(config, logits[t], ids[t], expert_scale)
    counts = np.array([(ids == e).sum() for e in range(experts)])
    all_ids, all_weights, saved_added = ids, weights, [[] for _ in ids]
    if config.router.round_to_tile is None:
        keep, drop_margin = keep_rows(config, ids, weights)
    else:
        all_ids = np.concatenate([ids, np.full_like(ids, -1)], axis=1)
        all_weights = np.concatenate([weights, np.zeros_like(weights)], axis=1)
        for t in range(tokens):
            added, next_margin = next_choices(config, logits[t], bias, ids[t])
            margin = min(margin, next_margin)
            for j, e in enumerate(added, k):  # an added expert's weight is the one that it has beside the own choices
                one_more, saved = weigh(config, logits[t], np.append(ids[t], e), expert_scale)
                all_ids[t, j], all_weights[t, j] = e, one_more[k]
                saved_added[t].append(saved)
        keep, drop_margin = keep_tiles(config, all_ids, all_weights)
    dropped = np.array([((ids == e) & ~keep[:, :k]).sum() for e in range(experts)])

    y, saved_tokens = np.zeros_like(flat), []
    rounding = rounding or Rounding()
    encoded, encoded_for_dgrad = encoded_weights(config.precision, params["experts"], rounding.nudge)
    for t in range(tokens):
        routing = all_ids[t], all_weights[t], keep[t]
        y[t], saved = token_forward(params, flat[t], config, *routing, encoded, rounding)
        saved_tokens.append(saved)

    sequence = leading[-1] if leading else 1
    batch = tokens // sequence if sequence else 0
    shape = (batch, sequence, experts)
    segment_ids = None if segment_ids is None else np.asarray(segment_ids).reshape(shape[:2])
    values, loss_gradients, loss_margin, counts_so_far = losses(
        config, logits.reshape(shape), mask.reshape(shape[:2]), segment_ids, global_counts
    )
    loss_gradients = {name: gradient.reshape(tokens, experts) for name, gradient in loss_gradients.items()}
    saved_weights = list(zip(saved_weights, saved_added, strict=True))
    tape = (flat, mask, logits, expert_scale, saved_weights, saved_tokens, loss_gradients, factors, encoded_for_dgrad)
    assert width == (config.latent_size or config.hidden_size)
    return Result(
        y.reshape(x.shape),
        ids.reshape(*leading, k),
        weights.reshape(*leading, k),
        counts,
        dropped,
        values,
        min(margin, drop_margin, loss_margin),
        tape,
        rounding,
        counts_so_far,
    )


def token_forward(params, x, config, ids, weights, keep, encoded=None, rounding=None):
    """One token's output [d], and the values for its backward pass.

    `encoded` is the experts' weights as products read them.
    """
    experts, rounding = params["experts"], rounding or Rounding()
    w_in, w_out = encoded or (experts["w_in"], experts["w_out"])
    fwd = config.precision and config.precision.fwd
    z, pre_norm, post_norm = x, None, None
    if config.latent_size is not None:
        z = z @ params["down_proj"]["kernel"]
    if config.latent_norm == "pre":
        z, pre_norm = rms_norm(z, params["latent_norm"]["scale"], config.latent_norm_eps)
    c, rows = np.zeros_like(z), []
    for j in np.nonzero(keep)[0]:
        e = ids[j]
        row = rounding(z * weights[j] if config.apply_probs_on_input else z, sent_as(config))
        biases = (experts["b_in"][e], experts["b_out"][e]) if config.expert_bias else (0.0, 0.0)
        out, saved = mlp(config, row, w_in[e], w_out[e], *biases, rounding, fwd)
        c = c + (out if config.apply_probs_on_input else weights[j] * out)
        rows.append((j, e, weights[j], saved))
    normed = c
    if config.latent_norm == "post":
        normed, post_norm = rms_norm(c, params["latent_norm"]["scale"], config.latent_norm_eps)
    scaled = normed * config.router.routed_scaling_factor if config.apply_routed_scale_to_output else normed
    y = scaled if config.latent_size is None else scaled @ params["up_proj"]["kernel"]
    shared = None
    if config.shared_expert_intermediate_size:
        out, saved_mlp = mlp(config, x, params["shared"]["w_in"], params["shared"]["w_out"])
        gate = sigmoid(x @ params["shared"]["gate"][:, 0]) if config.shared_expert_gate else 1.0
        shared = (saved_mlp, out, gate)
        y = y + gate * out
    return y, (z, pre_norm, rows, post_norm, scaled, shared)


def sent_as(config):
    """The format in which rows travel to experts on other devices, which all of a test's are taken to be."""
    return config.parallel and config.parallel.dispatch_format


def backward(params, config, result, dy, dlosses=1.0):
    """Gradients of sum(y * dy) + dlosses * sum(losses): returns those of params and of x."""
    flat, mask, logits, expert_scale, saved_weights, saved_tokens, loss_gradients, factors, encoded = result.tape
    grads = {part: {name: np.zeros(p.shape) for name, p in leaves.items()} for part, leaves in params.items()}
    dflat = np.zeros_like(flat)
    dlogits = dlosses * sum(loss_gradients.values())
    for t, out_gradient in enumerate(dy.reshape(flat.shape)):
        if not mask[t]:
            continue
        saved = saved_tokens[t]
        dflat[t], dweights = token_backward(
            params, flat[t], config, saved, out_gradient, grads, encoded, result.rounding
        )
        own, added = saved_weights[t]
        own_gradient, added_gradients = dweights[: config.top_k], dweights[config.top_k :]
        of_weights = [(own, own_gradient)] if own is not None else []
        of_weights += [(one, np.append(0 * own_gradient, dw)) for one, dw in zip(added, added_gradients, strict=False)]
        for saved, dw in of_weights:
            dlogit, dscale = weigh_backward(config, logits[t], expert_scale, saved, dw)
            dlogits[t] += dlogit
            if config.router.per_expert_scale:
                grads["router"]["scale"] += dscale
    grads["router"]["kernel"] += (flat * factors).T @ dlogits
    if config.router.logit_bias:
        grads["router"]["logit_bias"] += dlogits.sum(axis=0)
    dflat += dlogits @ params["router"]["kernel"].T * factors
    return grads, np.where(mask[:, None], dflat, 0.0).reshape(dy.shape)


def token_backward(params, x, config, saved, dy, grads, encoded, rounding):
    """Adds one token's part to grads of everything behind the router; returns the gradients of x and of weights."""
    z, pre_norm, rows, post_norm, scaled, shared = saved
    dx, dweights = np.zeros_like(x), np.zeros(2 * config.top_k)
    if shared is not None:
        saved_mlp, out, gate = shared
        w_in, w_out = params["shared"]["w_in"], params["shared"]["w_out"]
        drow, dw_in, dw_out, *_ = mlp_backward(saved_mlp, w_in, w_out, gate * dy)
        if config.shared_expert_gate:
            dlogit = gate * (1 - gate) * np.dot(dy, out)
            grads["shared"]["gate"][:, 0] += dlogit * x
            dx += dlogit * params["shared"]["gate"][:, 0]
        grads["shared"]["w_in"] += dw_in
        grads["shared"]["w_out"] += dw_out
        dx += drow
    dc = dy
    if config.latent_size is not None:
        grads["up_proj"]["kernel"] += np.outer(scaled, dy)
        dc = params["up_proj"]["kernel"] @ dy
    if config.apply_routed_scale_to_output:
        dc = dc * config.router.routed_scaling_factor
    if config.latent_norm == "post":
        dc, dscale = rms_norm_backward(post_norm, params["latent_norm"]["scale"], dc)
        grads["latent_norm"]["scale"] += dscale
    dc = rounding(dc, sent_as(config))
    dz = np.zeros_like(z)
    for j, e, weight, row_saved in rows:
        factor = 1.0 if config.apply_probs_on_input else weight
        w_in, w_out = (w[e] for w in encoded)
        dgrad = config.precision and config.precision.dgrad
        drow, dw_in, dw_out, dpre, dweights[j] = mlp_backward(row_saved, w_in, w_out, dc, factor, rounding, dgrad)
        if config.expert_bias:
            grads["experts"]["b_in"][e] += dpre
            grads["experts"]["b_out"][e] += factor * dc
            dweights[j] += dc @ params["experts"]["b_out"][e]
        grads["experts"]["w_in"][e] += dw_in
        grads["experts"]["w_out"][e] += dw_out
        if config.apply_probs_on_input:
            dweights[j] = np.dot(drow, z)
            drow = drow * weight
        dz += drow
    if config.latent_norm == "pre":
        dz, dscale = rms_norm_backward(pre_norm, params["latent_norm"]["scale"], dz)
        grads["latent_norm"]["scale"] += dscale
    if config.latent_size is not None:
        grads["down_proj"]["kernel"] += np.outer(x, dz)
        dz = params["down_proj"]["kernel"] @ dz
    return dx + dz, dweights


def norm_sums(result) -> list[float]:
    """mean(row^2) + eps of every token's latent norm, but of rows that are zero."""
    norms = [norm for _, pre_norm, _, post_norm, *_ in result.tape[5] for norm in (pre_norm, post_norm) if norm]
    return [inverse**-2 for row, inverse in norms if row.any()]


def update_correction_bias(bias, tokens_per_expert, rate):
    """b_e + rate * sign(mean(n) - n_e): DeepSeek-V3's balancing without an auxiliary loss (arXiv 2412.19437)."""
    mean = sum(tokens_per_expert) / len(tokens_per_expert)
    return np.array([b + rate * np.sign(mean - n) for b, n in zip(bias, tokens_per_expert, strict=True)])
