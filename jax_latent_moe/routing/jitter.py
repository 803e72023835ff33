"""Input jitter: the router reads its input times random factors near 1 (Switch Transformers, arXiv 2101.03961)."""

import jax
from jaxtyping import Array, Float, Int, Key

from jax_latent_moe.dtypes import at_least_float32


def jittered(
    x: Float[Array, "t d"], key: Key[Array, ""], eps: float, token_numbers: Int[Array, " t"]
) -> Float[Array, "t d"]:
    """The input times factors that are uniform in [1 - eps, 1 + eps), rounded to the input's dtype as in Megatron.

    Args:
        x: [T, d].
        key: a typed JAX key.
        eps: `RouterConfig.input_jitter`.
        token_numbers: [T], the number of each token in x as a whole. A token's factors depend on its number and on the
            key alone, so they are the same on every mesh.
    """
    wide = at_least_float32(x.dtype)

    def factors(number):
        return jax.random.uniform(jax.random.fold_in(key, number), x.shape[1:], wide, 1 - eps, 1 + eps)

    return (x.astype(wide) * jax.vmap(factors)(token_numbers)).astype(x.dtype)
