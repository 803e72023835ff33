"""Routing of one token, and its gradients, in float64."""

import numpy as np

from tests.oracle.activations import sigmoid


def softmax(logits):
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def log_sum_exp(logits):
    return logits.max() + np.log(np.exp(logits - logits.max()).sum())


def scores(function, logits):
    """Score p of every expert."""
    if function == "sigmoid":
        return sigmoid(logits)
    if function == "sqrt_softplus":
        return np.sqrt(np.logaddexp(0, logits))
    return softmax(logits)


def scores_backward(function, logits, dp):
    p = scores(function, logits)
    if function == "sigmoid":
        return dp * p * (1 - p)
    if function == "sqrt_softplus":
        return dp * sigmoid(logits) / (2 * p)
    return p * (dp - np.dot(p, dp))


def best(values, count):
    """Indices of the `count` largest, largest first, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def gap(values, count):
    """How far the last chosen value is from the best one left out, relative to their size."""
    chosen = best(values, len(values))
    if count >= len(values) or count < 1:
        return np.inf
    last, left = values[chosen[count - 1]], values[chosen[count]]
    return np.inf if np.isneginf(left) else (last - left) / max(1.0, abs(last), abs(left))


SINKHORN_TOLERANCE, SINKHORN_ITERATIONS = 1e-4, 1000
"""Change of the experts' factors at which Megatron's iteration ends, and the documented bound that Megatron lacks."""


def sinkhorn(logits, mask):
    """Megatron's balanced scores of the unmasked tokens: exp(logits) times factors that even out rows and columns.

    The scores are given by their logarithms, which have the same order and do not underflow.

    Returns:
        [T, E], and whether the iteration ended by itself.
    """
    cost = np.exp(logits - logits.max(axis=1, keepdims=True))[mask]  # the iteration takes out any factor per token
    tokens, experts = cost.shape
    by_expert, change, count = np.ones(experts), np.inf, 0
    while change > SINKHORN_TOLERANCE and count < SINKHORN_ITERATIONS:
        by_token = 1 / (max(tokens, 1) * (cost @ by_expert + 1e-8))
        new = 1 / (experts * (by_token @ cost + 1e-8))
        change, by_expert, count = np.abs(by_expert - new).mean(), new, count + 1
    return logits + np.log(by_expert), count < SINKHORN_ITERATIONS


def choose_balanced(config, balanced, ended):
    """Expert ids of one token [k] out of its row of `sinkhorn`, and the margin.

    Rounding may end the iteration a step earlier or later, and the last step moves the logarithms by about the
    tolerance. The margin is divided so that it is below `cases.MARGIN` for differences within 10 times that.
    """
    margin = gap(balanced, config.top_k) / (10 * SINKHORN_TOLERANCE / 2e-5)
    return np.array(best(balanced, config.top_k)), margin if ended else 0.0


def candidates(config, logits, bias):
    """What one token chooses by [E], -inf outside of its groups, and how far the nearest other groups were."""
    router = config.router
    by_logit = router.selection == "logit" or router.score_function == "softmax_topk"
    c = (logits if by_logit else scores(router.score_function, logits)) + bias
    if router.num_groups == 1:
        return c, np.inf
    groups = c.reshape(router.num_groups, -1)
    group_scores = [sum(sorted(group)[-router.group_score_topk :]) for group in groups]
    kept = best(group_scores, router.topk_groups)
    c = np.concatenate([group if i in kept else np.full_like(group, -np.inf) for i, group in enumerate(groups)])
    return c, gap(group_scores, router.topk_groups)


def choose(config, logits, bias):
    """Expert ids of one token [k], and how far the nearest other choice was."""
    c, margin = candidates(config, logits, bias)
    return np.array(best(c, config.top_k)), min(margin, gap(c, config.top_k))


def next_choices(config, logits, bias, ids):
    """The best min(k, E - k) other experts of a token with the choices ids, and how far the nearest others were."""
    if (ids < 0).all():
        return [], np.inf
    c, margin = candidates(config, logits, bias)
    c = np.where(np.isin(np.arange(len(c)), ids), -np.inf, c)
    count = min(config.top_k, config.num_experts - config.top_k)
    return [e for e in best(c, count) if c[e] > -np.inf], min(margin, gap(c, count))


def weigh(config, logits, ids, expert_scale):
    """Combine weights [k] of the chosen ids (-1: none), and what `weigh_backward` needs."""
    router = config.router
    places = [j for j, e in enumerate(ids) if e >= 0]
    chosen = ids[places]
    if router.score_function == "softmax_topk":
        p = softmax(logits[chosen]) if places else np.zeros(0)
    else:
        p = scores(router.score_function, logits)[chosen]
    total = p.sum() + router.norm_topk_eps
    normalised = p / total if router.norm_topk_prob and places else p
    factor = 1.0 if config.apply_routed_scale_to_output else router.routed_scaling_factor
    weights = np.zeros(len(ids))
    weights[places] = normalised * factor * expert_scale[chosen]
    return weights, (places, chosen, p, total, normalised, factor)


def weigh_backward(config, logits, expert_scale, saved, dweights):
    """Gradients of logits [E] and expert_scale [E]."""
    router = config.router
    places, chosen, p, total, normalised, factor = saved
    dlogits, dscale = np.zeros_like(logits), np.zeros_like(expert_scale)
    if not places:
        return dlogits, dscale
    dw = dweights[places]
    np.add.at(dscale, chosen, dw * normalised * factor)
    dp = dw * factor * expert_scale[chosen]
    if router.norm_topk_prob:
        dp = dp / total - np.dot(dp, p) / total**2
    if router.score_function == "softmax_topk":
        np.add.at(dlogits, chosen, p * (dp - np.dot(p, dp)))
        return dlogits, dscale
    dp_all = np.zeros_like(logits)
    np.add.at(dp_all, chosen, dp)
    return scores_backward(router.score_function, logits, dp_all), dscale


def auxiliary_scores(function, logits):
    """Scores [E] of the balance losses: they sum to one."""
    p = scores(function, logits)
    return p if function.startswith("softmax") else p / (p.sum() + 1e-20)


def auxiliary_scores_backward(function, logits, daux):
    if function.startswith("softmax"):
        return scores_backward(function, logits, daux)
    p = scores(function, logits)
    total = p.sum() + 1e-20
    return scores_backward(function, logits, daux / total - np.dot(daux, p) / total**2)
