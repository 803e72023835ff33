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


def matmul_activation_grad(config, dout, w, sizes, pre, row_weights):
    """The gradient of pre and hidden rows, both times row_weights, and its gradient; zeros beyond the sum."""
    owned = np.arange(len(dout)) < np.sum(sizes)
    dhidden = reference.grouped_matmul(dout, w, sizes, transpose_w=True)
    hidden, slopes = activation_of_rows(config, np.where(owned[:, None], pre, 0))
    hidden = hidden * owned[:, None]
    weights = np.where(owned, row_weights, 0)[:, None]
    dpre = slopes * np.tile(weights * dhidden, (1, 2 if config.gated else 1))
    return dpre, weights * hidden, np.sum(dhidden * hidden, axis=1)
