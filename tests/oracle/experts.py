"""The routed experts and their gradients in float64, one assignment at a time."""

import numpy as np

from tests.oracle.activations import mlp, mlp_backward


def routed(config, ids, tokens, weights, w_in, w_out, dout):
    """sum_j weights[t, j] * expert_j(tokens[t]), and the gradients of <it, dout>.

    Args:
        config: read for the activation.
        ids: [T, k]; an id outside of the experts is no expert.
        tokens: [T, l].
        weights: [T, k].
        w_in: [E, l, m], gated [E, l, 2, m].
        w_out: [E, m, l].
        dout: [T, l].

    Returns:
        The output and the gradients of tokens, weights, w_in and w_out, by name.
    """
    tokens, weights, w_in, w_out, dout = map(np.float64, (tokens, weights, w_in, w_out, dout))
    out, dtokens, dweights, dw_in, dw_out = map(np.zeros_like, (tokens, tokens, weights, w_in, w_out))
    for t, j in np.ndindex(*ids.shape):
        expert, weight = ids[t, j], weights[t, j]
        if not 0 <= expert < len(w_in):
            continue
        value, saved = mlp(config, tokens[t], w_in[expert], w_out[expert])
        out[t] += weight * value
        dweights[t, j] = dout[t] @ value
        dtoken, dexpert_in, dexpert_out = mlp_backward(saved, w_in[expert], w_out[expert], weight * dout[t])
        dtokens[t] += dtoken
        dw_in[expert] += dexpert_in
        dw_out[expert] += dexpert_out
    return {"out": out, "tokens": dtokens, "weights": dweights, "w_in": dw_in, "w_out": dw_out}
