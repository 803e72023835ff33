"""Grouped matmuls with an activation, or its gradient, fused behind them, in float64."""

import numpy as np

from jax_latent_moe.grouped_matmul import reference
from tests.oracle.activations import activation


def activation_of_rows(config, pre):
    """Hidden rows [R, m] of pre-activations [R, m] or [R, 2 m], and their derivatives in the shape of pre."""
    if not config.gated:
        return activation(config, pre)
    hidden, slopes = activation(config, np.stack(np.split(pre, 2, axis=1)))
    return hidden, np.concatenate(list(slopes), axis=1)


def kept_of(config, pre, residual):
    """The residual that a forward pass keeps of pre-activations."""
    hidden, _ = activation_of_rows(config, pre)
    if residual == "gate_hidden":
        return np.concatenate([pre[:, : hidden.shape[1]], hidden], axis=1)
    return {"pre": pre, "hidden": hidden}[residual]


def matmul_activation_grad(config, dout, w, sizes, kept, row_weights, residual):
    """The gradient of the pre-activation and hidden rows, both times row_weights; the gradient of row_weights.

    Hidden rows are None where they were kept, alone or behind the gate. Zeros beyond the sum.
    """
    owned = np.arange(len(dout)) < np.sum(sizes)
    dhidden = reference.grouped_matmul(dout, w, sizes, transpose_w=True)
    kept = np.where(owned[:, None], kept, 0)
    match residual:
        case "pre":
            hidden, slopes = activation_of_rows(config, kept)
        case "hidden":
            assert config.activation == "relu2"
            hidden, slopes = kept, 2 * np.sqrt(kept)
        case "gate_hidden":
            gate, hidden = np.split(kept, 2, axis=1)
            gate = np.where(owned[:, None], gate, 1)
            value, _ = activation_of_rows(config, np.concatenate([gate, np.ones_like(gate)], axis=1))
            hidden, slopes = activation_of_rows(config, np.concatenate([gate, hidden / value], axis=1))
    weights = np.where(owned, row_weights, 0)[:, None]
    dpre = slopes * np.tile(weights * dhidden, (1, 2 if config.gated else 1))
    drow_weights = np.sum(dhidden * hidden * owned[:, None], axis=1)
    return dpre, hidden * weights if residual == "pre" else None, drow_weights
