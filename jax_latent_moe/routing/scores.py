"""Scores of experts, their logarithms, and scores as probabilities. Their gradients stay finite under underflow."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def scores(logits: Float[Array, "*t e"], score_function: str) -> Float[Array, "*t e"]:
    """The score of each expert. For "softmax_topk" it is the logit: the softmax follows the choice."""
    if score_function == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if score_function == "sigmoid":
        return jax.nn.sigmoid(logits)
    if score_function == "sqrt_softplus":
        small, logits, small_logits = _split_at_underflow(logits)
        return jnp.where(small, jnp.exp(small_logits / 2), jnp.sqrt(jax.nn.softplus(logits)))
    assert score_function == "softmax_topk"
    return logits


def log_scores(logits: Float[Array, "*t e"], score_function: str) -> Float[Array, "*t e"]:
    """The logarithm of each score, up to a constant per token."""
    if score_function == "sigmoid":
        return jax.nn.log_sigmoid(logits)
    if score_function == "sqrt_softplus":
        small, logits, small_logits = _split_at_underflow(logits)
        return jnp.where(small, small_logits, jnp.log(jax.nn.softplus(logits))) / 2
    return logits


def probabilities(logits: Float[Array, "*t e"], score_function: str) -> Float[Array, "*t e"]:
    """The scores of all experts as probabilities, which the balance losses read: each token's sum is 1."""
    if score_function in ("softmax", "softmax_topk"):
        return jax.nn.softmax(logits, axis=-1)
    return over_sum(scores(logits, score_function), 1e-20)


def over_sum(values: Float[Array, "*t e"], eps: float) -> Float[Array, "*t e"]:
    """The values divided by (their sum + eps), for eps > 0."""
    values, total = scaled_and_sum(values, eps)
    return values / total


def scaled_and_sum(values: Float[Array, "*t e"], eps: float) -> tuple[Float[Array, "*t e"], Float[Array, "*t 1"]]:
    """The values and (their sum + eps), both times 2^40.

    The derivative of a quotient squares its divisor, and float32 cannot hold 1e-20 squared. The factor is exact.
    """
    values = values * 2.0**40
    return values, jnp.sum(values, axis=-1, keepdims=True) + eps * 2.0**40


def _split_at_underflow(logits):
    """Splits logits where log(1 + exp(a)) equals exp(a) to the last bit.

    Returns whether each logit is below that point, the logits above it, and the logits below it. Both arrays hold 0 in
    the other places. sqrt(exp(a)) is computed as exp(a / 2), which still has a slope where exp(a) underflows.
    """
    small = logits < math.log(jnp.finfo(logits.dtype).eps)
    return small, jnp.where(small, 0, logits), jnp.where(small, logits, 0)
