"""The whole layer, one token at a time, and its gradients, in float64."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from tests.oracle.activations import mlp, mlp_backward, sigmoid
from tests.oracle.losses import losses
from tests.oracle.router import choose, choose_balanced, gap, sinkhorn, weigh, weigh_backward


class Result(NamedTuple):
    """What the layer returns, and what `backward` needs.

    `margin` is the least distance of any discrete choice (experts, groups, drops) to another one: comparing ids with
    another precision only makes sense where it is well above that precision's rounding.
    """

    y: np.ndarray
    expert_ids: np.ndarray
    weights: np.ndarray
    tokens_per_expert: np.ndarray
    dropped_per_expert: np.ndarray
    losses: dict
    margin: float
    tape: Any
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


def forward(
    params, x, config, token_mask=None, expert_ids=None, segment_ids=None, global_counts=None, jitter=None
) -> Result:
    """The layer on x [..., d], float64 arrays in and out; jitter is the factors of the router's input, like x."""
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
    keep, drop_margin = keep_rows(config, ids, weights)
    dropped = np.array([((ids == e) & ~keep).sum() for e in range(experts)])

    y, saved_tokens = np.zeros_like(flat), []
    for t in range(tokens):
        y[t], saved = token_forward(params, flat[t], config, ids[t], weights[t], keep[t])
        saved_tokens.append(saved)

    sequence = leading[-1] if leading else 1
    batch = tokens // sequence if sequence else 0
    shape = (batch, sequence, experts)
    segment_ids = None if segment_ids is None else np.asarray(segment_ids).reshape(shape[:2])
    values, loss_gradients, loss_margin, counts_so_far = losses(
        config, logits.reshape(shape), mask.reshape(shape[:2]), segment_ids, global_counts
    )
    loss_gradients = {name: gradient.reshape(tokens, experts) for name, gradient in loss_gradients.items()}
    tape = (flat, mask, logits, expert_scale, saved_weights, saved_tokens, loss_gradients, factors)
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
        counts_so_far,
    )


def token_forward(params, x, config, ids, weights, keep):
    """One token's output [d] and what its backward pass needs."""
    experts = params["experts"]
    z, pre_norm, post_norm = x, None, None
    if config.latent_size is not None:
        z = z @ params["down_proj"]["kernel"]
    if config.latent_norm == "pre":
        z, pre_norm = rms_norm(z, params["latent_norm"]["scale"], config.latent_norm_eps)
    c, rows = np.zeros_like(z), []
    for j in np.nonzero(keep)[0]:
        e = ids[j]
        row = z * weights[j] if config.apply_probs_on_input else z
        biases = (experts["b_in"][e], experts["b_out"][e]) if config.expert_bias else ()
        out, saved = mlp(config, row, experts["w_in"][e], experts["w_out"][e], *biases)
        c = c + (out if config.apply_probs_on_input else weights[j] * out)
        rows.append((j, e, weights[j], out, saved))
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


def backward(params, config, result, dy, dlosses=1.0):
    """Gradients of sum(y * dy) + dlosses * sum(losses): returns those of params and of x."""
    flat, mask, logits, expert_scale, saved_weights, saved_tokens, loss_gradients, factors = result.tape
    grads = {part: {name: np.zeros(p.shape) for name, p in leaves.items()} for part, leaves in params.items()}
    dflat = np.zeros_like(flat)
    dlogits = dlosses * sum(loss_gradients.values())
    for t, out_gradient in enumerate(dy.reshape(flat.shape)):
        if not mask[t]:
            continue
        dflat[t], dweights = token_backward(params, flat[t], config, saved_tokens[t], out_gradient, grads)
        if saved_weights[t] is not None:
            dlogit, dscale = weigh_backward(config, logits[t], expert_scale, saved_weights[t], dweights)
            dlogits[t] += dlogit
            if config.router.per_expert_scale:
                grads["router"]["scale"] += dscale
    grads["router"]["kernel"] += (flat * factors).T @ dlogits
    if config.router.logit_bias:
        grads["router"]["logit_bias"] += dlogits.sum(axis=0)
    dflat += dlogits @ params["router"]["kernel"].T * factors
    return grads, np.where(mask[:, None], dflat, 0.0).reshape(dy.shape)


def token_backward(params, x, config, saved, dy, grads):
    """Adds one token's part to grads of everything behind the router; returns the gradients of x and of weights."""
    z, pre_norm, rows, post_norm, scaled, shared = saved
    dx, dweights = np.zeros_like(x), np.zeros(config.top_k)
    if shared is not None:
        saved_mlp, out, gate = shared
        drow, dw_in, dw_out, _ = mlp_backward(saved_mlp, params["shared"]["w_in"], params["shared"]["w_out"], gate * dy)
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
    dz = np.zeros_like(z)
    for j, e, weight, out, row_saved in rows:
        dout = dc if config.apply_probs_on_input else weight * dc
        w_in, w_out = params["experts"]["w_in"][e], params["experts"]["w_out"][e]
        drow, dw_in, dw_out, dpre = mlp_backward(row_saved, w_in, w_out, dout)
        if config.expert_bias:
            grads["experts"]["b_in"][e] += dpre
            grads["experts"]["b_out"][e] += dout
        grads["experts"]["w_in"][e] += dw_in
        grads["experts"]["w_out"][e] += dw_out
        if config.apply_probs_on_input:
            dweights[j] = np.dot(drow, z)
            drow = drow * weight
        else:
            dweights[j] = np.dot(dc, out)
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
