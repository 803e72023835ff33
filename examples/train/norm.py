"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and dropout, in forms that XLA fuses into few passes over memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-6
STEPS = 256
"""The probability of dropout is a multiple of 1 / 256, because four elements share one 32-bit random number."""


@jax.custom_vjp
def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"]) -> Float[Array, "*batch d"]:
    """RMSNorm: x over the root of its mean square, times scale. It computes in float32 and returns x's dtype.

    The forward pass keeps only x. The backward pass computes both sums over a row in one pass over x and the gradient.
    Without the barrier, XLA would take the first sum from the forward pass. XLA then computes the sum and the norm in
    two passes over x, because a kernel that does both has no place for the sum.
    """
    wide = x.astype(jnp.float32)
    return (wide * inverse_root(wide) * scale).astype(x.dtype)


def inverse_root(wide: Float[Array, "*batch d"]) -> Float[Array, "*batch 1"]:
    """1 over the root of the mean square of the last axis, plus `EPSILON`."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPSILON)


def _forward(x, scale):
    return rms_norm(x, scale), (x, scale)


def _backward(residuals, gradient):
    x, scale = residuals
    x = jax.lax.optimization_barrier(x)
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    root, scaled = inverse_root(wide), gradient * scale
    along = jnp.mean(scaled * wide, axis=-1, keepdims=True)
    dx = root * scaled - wide * (root**3 * along)
    dscale = jnp.sum(gradient * wide * root, axis=range(x.ndim - 1))
    return dx.astype(x.dtype), dscale


rms_norm.defvjp(_forward, _backward)


class Dropout(nn.Module):
    """Sets random elements to zero and scales the others, which keeps the mean. It needs a "dropout" key.

    Attributes:
        rate: the probability that an element becomes zero, rounded to a multiple of 1 / 256.
        deterministic: True returns the input unchanged.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Applies dropout to x."""
        dropped = round(self.rate * STEPS)
        if self.deterministic or not dropped:
            return x
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32)
        drawn = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
        return jnp.where(drawn >= dropped, x * (STEPS / (STEPS - dropped)), 0).astype(x.dtype)
