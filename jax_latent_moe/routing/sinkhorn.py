"""Sinkhorn's balanced assignment, by which a router may choose experts (S-BASE, arXiv 2202.01169, as in Megatron)."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jax_latent_moe.varying import varying

TOLERANCE, EPS = 1e-4, 1e-8
"""Both are Megatron's: the mean change of the experts' factors that ends the iteration, and a divisor's addend."""
MOST_ITERATIONS = 1000
"""Megatron has no bound. Logits that underflow beside their token's largest may converge slowly."""


def balanced_scores(
    logits: Float[Array, "t e"],
    token_mask: Bool[Array, " t"] | None = None,
    all_tokens: Callable[[Array], Array] = lambda values: values,
) -> Float[Array, "t e"]:
    """Logits plus an offset per expert, by which each token chooses.

    Sinkhorn's iteration scales exp(logits) by a factor per token and a factor per expert, in turn, until all tokens
    have the same sum and all experts have the same sum. The offset is the logarithm of the expert's factor. The token's
    own factor is left out, because it does not change the order of its experts. A single token has nothing to balance,
    and its scores are its logits.

    Args:
        logits: [T, E]. No gradient flows.
        token_mask: [T]; tokens that are False have no part in the factors.
        all_tokens: sums a value over the devices that hold the other tokens.
    """
    logits = lax.stop_gradient(logits)
    # A factor per token does not change the result, and exp of a large logit is infinite.
    cost = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    real = jnp.ones(logits.shape[:1], bool) if token_mask is None else token_mask
    tokens, experts = jnp.maximum(all_tokens(jnp.sum(real)), 1).astype(cost.dtype), logits.shape[1]

    def step(state):
        count, factors, _ = state
        of_tokens = jnp.where(real, 1 / (tokens * (jnp.sum(factors[None] * cost, axis=1) + EPS)), 0)
        new = 1 / (experts * (all_tokens(jnp.sum(of_tokens[:, None] * cost, axis=0)) + EPS))
        return count + 1, new, jnp.mean(jnp.abs(factors - new))

    def goes_on(state):
        count, _, change = state
        return (change > TOLERANCE) & (count < MOST_ITERATIONS)

    factors, change = varying((jnp.ones(experts, cost.dtype), jnp.full((), jnp.inf, cost.dtype)), cost, real)
    _, factors, _ = lax.while_loop(goes_on, step, (jnp.zeros((), jnp.int32), factors, change))
    # The factors of a single token make all its experts equal, and rounding would choose among them.
    return logits + jnp.where(tokens > 1, jnp.log(factors), 0)[None]
