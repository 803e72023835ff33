"""Activations and their derivatives, in float64."""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x):
    with np.errstate(invalid="ignore"):  # NaN of padding rows
        return np.exp(-np.logaddexp(0, -x))  # 0.5 (1 + tanh(x / 2)) would cancel


def gelu(x, approximate):
    """Value and derivative of x * Phi(x), or of its tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    if approximate:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        t = np.tanh(inner)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope
    phi = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * phi, phi + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def silu(x):
    s = sigmoid(x)
    return x * s, s + x * s * (1 - s)


def situ_gate(x, beta):
    t, s = np.tanh(x / beta), sigmoid(x)
    return beta * t * s, (1 - t**2) * s + beta * t * s * (1 - s)


def clamped_swiglu_gate(x, alpha, limit):
    g = np.minimum(x, limit)
    s = sigmoid(alpha * g)
    return g * s, np.where(x <= limit, s + alpha * g * s * (1 - s), 0)


def clamped_up(x, limit, shift):
    return np.clip(x, -limit, limit) + shift, (np.abs(x) <= limit).astype(float)


def situ_up(x, beta):
    if beta is None:
        return x, np.ones_like(x)
    t = np.tanh(x / beta)
    return beta * t, 1 - t**2


def activation(config, pre):
    """Hidden values h and their derivatives for the pre-activations of one row: [m], or gate and up as [2, m].

    Returns:
        h [m], and dh/dpre in the shape of pre.
    """
    if config.activation == "relu2":
        return np.maximum(pre, 0) ** 2, 2 * np.maximum(pre, 0)
    if config.activation == "gelu":
        return gelu(pre, config.gelu_approximate)
    gate, up = pre
    if config.activation == "swiglu":
        (a, da), (b, db) = silu(gate), (up, np.ones_like(up))
    elif config.activation == "clamped_swiglu":
        a, da = clamped_swiglu_gate(gate, config.swiglu_alpha, config.swiglu_limit)
        b, db = clamped_up(up, config.swiglu_limit, config.swiglu_shift)
    elif config.activation == "geglu":
        (a, da), (b, db) = gelu(gate, config.gelu_approximate), (up, np.ones_like(up))
    else:
        (a, da), (b, db) = situ_gate(gate, config.situ_beta), situ_up(up, config.situ_linear_beta)
    return a * b, np.stack([da * b, a * db])


def unrounded(row, format):
    """Operands as they are."""
    del format
    return row


def mlp(config, row, w_in, w_out, b_in=0.0, b_out=0.0, rounding=unrounded, format=None):
    """One feed-forward on one row: returns its output and what `mlp_backward` needs."""
    pre = np.einsum("i,i...->...", rounding(row, format), w_in) + b_in
    h, slope = activation(config, pre)
    return rounding(h, format) @ w_out + b_out, (row, h, slope)


def mlp_backward(saved, w_in, w_out, dout, weight=1.0, rounding=unrounded, format=None):
    """Gradients of row, w_in, w_out and b_in, and <dout, h w_out>; that of b_out is weight * dout.

    The gradient of the output is weight * dout. Weights and rows have gradients of their unrounded values.
    """
    row, h, slope = saved
    dh = w_out @ rounding(dout, format)
    dpre = weight * dh * slope
    axes = tuple(range(dpre.ndim))
    drow = np.tensordot(w_in, rounding(dpre, format), axes=(tuple(a + 1 for a in axes), axes))
    return drow, np.multiply.outer(row, dpre), np.outer(h, weight * dout), dpre, dh @ h
