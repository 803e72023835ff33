"""Activations and their slopes in float32, without branches, from operations that Mosaic GPU can lower.

A division branches in every thread, and so does the library's tanh. erf has no lowering in the oldest supported JAX.
Everything is therefore built from exp and rsqrt, whose square is the reciprocal of a positive number.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_latent_moe.activations import Residual
from jax_latent_moe.grouped_matmul.sm90 import KernelActivation

Block = Float[Array, "rows columns"]

# erfc(x) = t (c0 + t (c1 + ...)) exp(-x^2), t = 1 / (1 + p x), to 1.5e-7: Abramowitz and Stegun (1964), 7.1.26.
_ERFC_P = 0.3275911
_ERFC_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
# gelu's tanh form: Hendrycks and Gimpel (arXiv 1606.08415).
_GELU_SCALE, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715
# Below this, 2 sigmoid(2x) - 1 loses digits that x - x^3 / 3 keeps.
_SMALL_TANH = 0.02
# Near the smallest normal float32. Its reciprocal square root is finite.
_SMALLEST = 1.2e-38


def value_and_slopes(activation: KernelActivation, parts: list[Block]) -> tuple[Block, list[Block]]:
    """The activation of its parts, [u] or [gate, up], and its derivative with respect to each part."""
    first, slope = _first(activation, parts[0])
    if not activation.gated:
        return first, [slope]
    up, up_slope = _up(activation, parts[1])
    return first * up, [slope * up, first if up_slope is None else first * up_slope]


def value_and_slopes_of_residual(
    activation: KernelActivation, residual: Residual, parts: list[Block]
) -> tuple[Block, list[Block]]:
    """The same from the residual of a forward pass: the pre-activation's parts, or relu2's hidden rows."""
    if residual == "pre":
        return value_and_slopes(activation, parts)
    (hidden,) = parts
    return hidden, [2 * hidden * lax.rsqrt(jnp.maximum(hidden, _SMALLEST))]


def _first(activation, x):
    """Value and slope of the function applied to u, or to the gate."""
    match activation.name:
        case "relu2":
            positive = jnp.where(x < 0, 0, x)
            return positive * positive, 2 * positive
        case "gelu" | "geglu":
            density = jnp.exp(-0.5 * x * x)
            t = _reciprocal(1 + (_ERFC_P / math.sqrt(2)) * jnp.abs(x))
            polynomial = jnp.zeros_like(x)
            for coefficient in reversed(_ERFC_COEFFICIENTS):
                polynomial = (polynomial + coefficient) * t
            tail = 0.5 * polynomial * density
            below = jnp.where(x < 0, tail, 1 - tail)
            return x * below, below + x * density * (1 / math.sqrt(2 * math.pi))
        case "gelu_tanh" | "geglu_tanh":
            # (1 + tanh(z)) / 2 = sigmoid(2z)
            square = x * x
            below = _sigmoid(2 * _GELU_SCALE * x * (1 + _GELU_CUBE * square))
            slope = 2 * _GELU_SCALE * (1 + 3 * _GELU_CUBE * square)
            return x * below, below + x * below * (1 - below) * slope
        case "swiglu":
            sigmoid = _sigmoid(x)
            return x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid)
        case "situ_glu":
            sigmoid, tanh = _sigmoid(x), _tanh(x * (1 / activation.beta))
            value = activation.beta * tanh * sigmoid
            return value, (1 - tanh * tanh) * sigmoid + value * (1 - sigmoid)
    raise AssertionError(activation)


def _up(activation, x):
    """Value and slope of the function applied to the up half; None for a slope of 1."""
    if not activation.linear_beta:
        return x, None
    tanh = _tanh(x * (1 / activation.linear_beta))
    return activation.linear_beta * tanh, 1 - tanh * tanh


def _sigmoid(x):
    return _reciprocal(1 + jnp.exp(-x))


def _tanh(x):
    return jnp.where(jnp.abs(x) < _SMALL_TANH, x * (1 - x * x * (1 / 3)), 2 * _sigmoid(2 * x) - 1)


def _reciprocal(x):
    """1 / x for positive x, infinity included."""
    root = lax.rsqrt(x)
    return root * root
