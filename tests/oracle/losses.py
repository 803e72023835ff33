"""Auxiliary losses of one batch from its logits, and their gradients, in float64."""

import numpy as np

from tests.oracle.router import auxiliary_scores, auxiliary_scores_backward, best, gap, log_sum_exp, softmax


def balance_loss(config, logits):
    """Switch loss E / (k T^2) * sum_e n_e sum_t P[t,e] of tokens [T,E], its gradient, and the margin of its choices.

    Fedus et al., arXiv 2101.03961, for k choices; n_e counts the clean top-k of P: no bias, no groups.
    """
    tokens, experts = logits.shape
    if tokens == 0:
        return 0.0, np.zeros_like(logits), np.inf
    function, k = config.router.score_function, config.top_k
    probabilities = [auxiliary_scores(function, row) for row in logits]
    counts = np.zeros(experts)
    for p in probabilities:
        counts[best(p, k)] += 1
    factor = experts / (k * tokens**2)
    gradient = np.stack([auxiliary_scores_backward(function, row, factor * counts) for row in logits])
    return factor * float(counts @ sum(probabilities)), gradient, min(gap(p, k) for p in probabilities)


def global_loss(config, logits, earlier):
    """E * sum_e f_e * mean_t P[t,e], its gradient, the margin of its choices, and the counts behind f_e.

    Qiu et al., arXiv 2501.11873: f_e is the share of expert e in the choices of all microbatches so far.
    """
    tokens, experts = logits.shape
    function, k = config.router.score_function, config.top_k
    probabilities = [auxiliary_scores(function, row) for row in logits]
    counts = np.array(earlier, float)
    for p in probabilities:
        counts[best(p, k)] += 1
    if tokens == 0:
        return 0.0, np.zeros_like(logits), np.inf, counts
    shares = experts * counts / counts.sum() / tokens
    gradient = np.stack([auxiliary_scores_backward(function, row, shares) for row in logits])
    return float(shares @ sum(probabilities)), gradient, min(gap(p, k) for p in probabilities), counts


def documents(mask, segment_ids):
    """The places (b, s) of the unmasked tokens of each sequence, or of each document in it."""
    found = {}
    for b, s in zip(*np.nonzero(mask), strict=True):
        found.setdefault((b, None if segment_ids is None else segment_ids[b, s]), []).append((b, s))
    return [tuple(np.array(places).T) for places in found.values()]


def losses(config, logits, mask, segment_ids=None, global_counts=None):
    """Losses of logits [B, S, E] under mask [B, S].

    Returns:
        dict of values, dict of gradients [B, S, E] of each, the margin of the choices they made, and the counts of the
        global loss or None.
    """
    router, counts = config.router, None
    names = ("switch", "sequence", "z", "global") if router.global_loss_coef else ("switch", "sequence", "z")
    values = dict.fromkeys(names, 0.0)
    gradients = {name: np.zeros_like(logits) for name in values}
    margin = np.inf
    if router.switch_loss_coef:
        value, gradient, margin = balance_loss(config, logits[mask])
        values["switch"] = router.switch_loss_coef * value
        gradients["switch"][mask] = router.switch_loss_coef * gradient
    if router.sequence_loss_coef and mask.any():
        found = documents(mask, segment_ids)
        coef = router.sequence_loss_coef / len(found)
        for places in found:
            value, gradient, sequence_margin = balance_loss(config, logits[places])
            values["sequence"] += coef * value
            gradients["sequence"][places] = coef * gradient
            margin = min(margin, sequence_margin)
    if router.global_loss_coef:
        earlier = np.zeros(config.num_experts) if global_counts is None else global_counts
        value, gradient, global_margin, counts = global_loss(config, logits[mask], earlier)
        values["global"] = router.global_loss_coef * value
        gradients["global"][mask] = router.global_loss_coef * gradient
        margin = min(margin, global_margin)
    if router.z_loss_coef and mask.any():
        coef = router.z_loss_coef / mask.sum()
        for b, s in zip(*np.nonzero(mask), strict=True):
            row = logits[b, s]
            values["z"] += coef * log_sum_exp(row) ** 2
            gradients["z"][b, s] = coef * 2 * log_sum_exp(row) * softmax(row)
    return values, gradients, margin, counts
