"""The routed experts and their gradients in float64, one assignment at a time."""

import numpy as np

from tests.oracle.activations import mlp, mlp_backward


def routed(config, ids, tokens, weights, w_in, w_out, dout, b_in=None, b_out=None):
    """sum_j weights[t, j] * expert_j(tokens[t]), and the gradients of <it, dout>.

    Args:
        config: read for the activation.
        ids: [T, k]; an id outside of the experts means none.
        tokens: [T, l].
        weights: [T, k].
        w_in: [E, l, m], gated [E, l, 2, m].
        w_out: [E, m, l].
        dout: [T, l].
        b_in: [E, m], gated [E, 2, m], or None.
        b_out: [E, l], or None.

    Returns:
        The output and the gradients of tokens, weights, w_in and w_out, and of b_in and b_out if given, by name.
    """
    with_biases = b_in is not None
    if not with_biases:
        b_in, b_out = np.zeros((len(w_in), *w_in.shape[2:])), np.zeros((len(w_in), tokens.shape[1]))
    tokens, weights, w_in, w_out, dout = map(np.float64, (tokens, weights, w_in, w_out, dout))
    out, dtokens, dweights, dw_in, dw_out = map(np.zeros_like, (tokens, tokens, weights, w_in, w_out))
    db_in, db_out = np.zeros(b_in.shape), np.zeros(b_out.shape)
    for t, j in np.ndindex(*ids.shape):
        expert, weight = ids[t, j], weights[t, j]
        if not 0 <= expert < len(w_in):
            continue
        value, saved = mlp(config, tokens[t], w_in[expert], w_out[expert], b_in[expert], b_out[expert])
        out[t] += weight * value
        dweights[t, j] = dout[t] @ value
        drow = weight * dout[t]
        dtoken, dexpert_in, dexpert_out, dpre, _ = mlp_backward(saved, w_in[expert], w_out[expert], drow)
        dtokens[t] += dtoken
        dw_in[expert] += dexpert_in
        dw_out[expert] += dexpert_out
        db_in[expert] += dpre
        db_out[expert] += drow
    found = {"out": out, "tokens": dtokens, "weights": dweights, "w_in": dw_in, "w_out": dw_out}
    return found | ({"b_in": db_in, "b_out": db_out} if with_biases else {})
