"""Quantile balancing: the bias at which every expert is chosen equally often (Megatron's quantile_balancing, marin).

A token chooses expert e if its score plus the bias exceeds the biased score of the best expert left out. With the other
experts' biases as they are, the bias at which n tokens do so is a quantile over the tokens.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jax_latent_moe.varying import varying


def target_bias(
    scores: Float[Array, "t e"],
    bias: Float[Array, " e"],
    top_k: int,
    token_mask: Bool[Array, " t"] | None = None,
    all_tokens: Callable[[Array], Array] = lambda values: values,
) -> Float[Array, " e"]:
    """The bias of each expert at which it is chosen by floor(T k / E) of the T unmasked tokens, [E] float32.

    It is minus the (floor(T k / E) + 1)-th largest scores[t, e] - a_t over the tokens, where a_t is the (k + 1)-th
    largest of scores[t] + bias. Ties aside, that is Megatron's qb_dual_update, whose beta is minus the bias.

    Args:
        scores: [T, E], the scores of the choice without the bias. No gradient flows.
        bias: [E].
        top_k: k, less than E.
        token_mask: [T]; tokens that are False do not count.
        all_tokens: sums a value over the devices that hold the other tokens.
    """
    scores = lax.stop_gradient(scores).astype(jnp.float32)
    bias = lax.stop_gradient(bias).astype(jnp.float32)
    real = jnp.ones(scores.shape[:1], bool) if token_mask is None else token_mask
    left_out = lax.top_k(scores + bias[None], top_k + 1)[0][:, top_k]
    tokens = all_tokens(jnp.sum(real))
    target = -nth_largest(scores - left_out[:, None], tokens * top_k // scores.shape[1], real, all_tokens)
    return jnp.where(tokens > 0, target, bias)


def nth_largest(
    values: Float[Array, "t e"], n: Int[Array, ""], real: Bool[Array, " t"], all_tokens: Callable[[Array], Array]
) -> Float[Array, " e"]:
    """The value of each column that exactly n real values exceed, or tie with it: n = 0 is the largest.

    The bits of the result are found from the highest down, by counting the values that are at least as large. The
    tokens of other devices add to the counts, so no device needs their values.
    """
    keys = _ordered(values)

    def step(i, found):
        candidate = found | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        count = all_tokens(jnp.sum((keys >= candidate[None]) & real[:, None], axis=0))
        return jnp.where(count > n, candidate, found)

    start = varying(jnp.zeros(values.shape[1], jnp.uint32), values, real)
    found = lax.fori_loop(0, 32, step, start)
    # Without real tokens no bit is set, which are the bits of a NaN. The result is then 0.
    return _from_ordered(jnp.where(found == 0, jnp.uint32(1 << 31), found))


def _ordered(values: Float[Array, "t e"]) -> UInt32[Array, "t e"]:
    """Integers in the order of float32 values: the bits with the sign flipped, or all inverted for negative values."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


def _from_ordered(keys):
    bits = jnp.where(keys >> 31 == 0, ~keys, keys & jnp.uint32((1 << 31) - 1))
    return lax.bitcast_convert_type(bits, jnp.float32)


def move_to_target(
    bias: Float[Array, "*layers e"],
    target: Float[Array, "*layers e"],
    rate: float | Float[Array, ""],
    axis_name: str | Sequence[str] | None = None,
) -> Float[Array, "*layers e"]:
    """Moves a bias to bias + rate * (target - bias), less the mean over experts, [..., E] float32.

    Args:
        bias: [..., E].
        target: [..., E], the mean `LatentMoEAux.bias_target` of the step's microbatches.
        rate: 1 goes all the way; Megatron's moe_router_quantile_balancing_ema is 1 - rate.
        axis_name: mapped axes over which the target is averaged first.
    """
    target = target if axis_name is None else lax.pmean(target, axis_name)
    bias = bias.astype(jnp.float32)
    moved = bias + rate * (target - bias)
    return moved - jnp.mean(moved, axis=-1, keepdims=True)
