"""The shared expert and its gradients in float64, all tokens at once."""

import numpy as np

from tests.oracle.activations import activation, sigmoid


def shared(config, x, w_in, w_out, dout, gate=None):
    """act(x w_in) w_out, times sigmoid(x gate) if there is a gate, and the gradients of <it, dout>.

    Args:
        config: read for the activation.
        x: [T, d].
        w_in: [d, m], gated [d, 2, m].
        w_out: [m, d].
        dout: [T, d].
        gate: [d, 1] or None.

    Returns:
        The output and the gradients of x, w_in, w_out and, if given, gate, by name.
    """
    x, w_in, w_out, dout = map(np.float64, (x, w_in, w_out, dout))
    pre = np.tensordot(x, w_in, axes=1)
    hidden, slope = activation(config, np.moveaxis(pre, 1, 0) if config.gated else pre)
    out = hidden @ w_out
    opened = np.ones((len(x), 1)) if gate is None else sigmoid(x @ np.float64(gate))
    dhidden = (opened * dout) @ w_out.T
    dpre = np.moveaxis(dhidden * slope, 0, 1) if config.gated else dhidden * slope
    dflat = dpre.reshape(len(x), -1)
    dx = dflat @ w_in.reshape(len(w_in), -1).T
    found = {"w_in": (x.T @ dflat).reshape(w_in.shape), "w_out": hidden.T @ (opened * dout)}
    if gate is not None:
        dlogit = np.sum(dout * out, axis=1, keepdims=True) * opened * (1 - opened)
        dx, found["gate"] = dx + dlogit @ np.float64(gate).T, x.T @ dlogit
    return {"out": opened * out, "x": dx} | found
