"""The step of the correction bias, which evens out the loads of the experts without a loss."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_latent_moe.arrays import as_numbers, check_fits_int32, given_numbers
from jax_latent_moe.errors import InputError


def update_correction_bias(
    bias: Float[Array, "*layers e"],
    tokens_per_expert: Int[Array, "*layers e"],
    rate: float | Float[Array, ""],
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> Float[Array, "*layers e"]:
    """b_e + rate * sign(mean(n) - n_e): raises the bias of experts with few tokens (DeepSeek-V3, arXiv 2412.19437).

    Call it after the optimiser's step, outside of autodiff, with the counts of the whole batch.

    Args:
        bias: [..., E] float32. The axes before the last one are layers.
        tokens_per_expert: [..., E] integers, as in `LatentMoEAux`. The comparison with the mean is exact.
        rate: the step, `RouterConfig.bias_update_rate`.
        recentre: subtract the mean over experts afterwards. That never changes a choice, and it keeps the biases near
            0, where float32 is finest.
        axis_name: mapped axes over which the counts are summed first.

    Returns:
        [..., E] float32.

    Raises:
        InputError: the counts are not integers within int32, or not of the bias's shape, or the rate is not a number.
    """
    as_numbers("rate", rate)
    bias, counts = as_numbers("bias", bias), given_numbers("tokens_per_expert", tokens_per_expert)
    check_fits_int32("tokens_per_expert", counts)
    counts = jnp.asarray(counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise InputError(f"tokens_per_expert of dtype {counts.dtype} must be integers: counts, not means or shares.")
    if counts.shape != bias.shape:
        raise InputError(f"tokens_per_expert of shape {counts.shape} must have the bias's shape {bias.shape}.")
    counts = counts if counts.dtype.itemsize >= 4 else counts.astype(jnp.int32)
    counts = counts if axis_name is None else lax.psum(counts, axis_name)
    moved = bias.astype(jnp.float32) + rate * _sign_of_mean_minus(counts).astype(jnp.float32)
    return moved - jnp.mean(moved, axis=-1, keepdims=True) if recentre else moved


def _sign_of_mean_minus(counts):
    """sign(mean(n) - n_e) without rounding. float32 cannot hold 2^24 + 1, and a sum of counts may exceed 2^31."""
    experts = counts.shape[-1]
    rest = jnp.sum(counts % experts, axis=-1, keepdims=True)
    mean = jnp.sum(counts // experts, axis=-1, keepdims=True) + rest // experts
    rest %= experts  # the mean is mean + rest / experts
    return jnp.where(counts > mean, -1, jnp.where((counts == mean) & (rest == 0), 0, 1))
