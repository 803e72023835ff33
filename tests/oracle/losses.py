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


def losses(config, logits, mask):
    """Losses of logits [B, S, E] under mask [B, S].

    Returns:
        dict of values, dict of gradients [B, S, E] of each, and the margin of the choices they made.
    """
    router = config.router
    values = dict.fromkeys(("switch", "sequence", "z"), 0.0)
    gradients = {name: np.zeros_like(logits) for name in values}
    margin = np.inf
    if router.switch_loss_coef:
        value, gradient, margin = balance_loss(config, logits[mask])
        values["switch"] = router.switch_loss_coef * value
        gradients["switch"][mask] = router.switch_loss_coef * gradient
    if router.sequence_loss_coef and mask.any():
        coef = router.sequence_loss_coef / mask.any(axis=1).sum()
        for b, rows in enumerate(mask):
            value, gradient, sequence_margin = balance_loss(config, logits[b][rows])
            values["sequence"] += coef * value
            gradients["sequence"][b][rows] = coef * gradient
            margin = min(margin, sequence_margin)
    if router.z_loss_coef and mask.any():
        coef = router.z_loss_coef / mask.sum()
        for b, s in zip(*np.nonzero(mask), strict=True):
            row = logits[b, s]
            values["z"] += coef * log_sum_exp(row) ** 2
            gradients["z"][b, s] = coef * 2 * log_sum_exp(row) * softmax(row)
    return values, gradients, margin
