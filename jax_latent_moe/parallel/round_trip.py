"""Tokens' rows on their way to the experts, and the sums on their way back. Each movement is the other's gradient.

Rows may travel as codes: latents in the forward pass, and the gradients of the sums in the backward pass. What comes
back is summed, so it travels in the rows' dtype. DeepSeek-V3 exchanges so (arXiv 2412.19437, section 3.3.2). Rounding
to codes has the gradient of the identity.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.formats import encode_rows


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """The movements of one dispatch.

    Attributes:
        there: (leaf [T, ...], indices) -> [R, ...], the rows that arrive at this device's experts. A row of no token
            is zero.
        back: (rows [R, l], indices) -> the sums [T, l] of each token's rows.
        format: the format of rows on the way there; None is their own dtype.
    """

    there: Callable[[Array, Any], Array]
    back: Callable[[Float[Array, "r l"], Any], Float[Array, "t l"]]
    format: str | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_experts(trip: RoundTrip, tokens: Float[Array, "t l"], indices: Any) -> Float[Array, "r l"]:
    """The rows that arrive, in the dtype of the tokens. The indices are any tree of integers."""
    if trip.format is None:
        return trip.there(tokens, indices)
    codes = jax.tree.map(lambda leaf: trip.there(leaf, indices), encode_rows(tokens, trip.format))
    # A value may be rounded up beyond the dtype's largest number: 65000 to 65536, which float16 does not have.
    largest = float(jnp.finfo(tokens.dtype).max)
    return jnp.clip(codes.decode(at_least_float32(tokens.dtype)), -largest, largest).astype(tokens.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_tokens(trip: RoundTrip, rows: Float[Array, "r l"], indices: Any) -> Float[Array, "t l"]:
    """The sum of each token's rows, in their dtype."""
    return trip.back(rows, indices)


def _fwd(function, trip, values, indices):
    return function(trip, values, indices), indices


def _bwd(transposed, trip, indices, cotangent):
    return transposed(trip, cotangent, indices), None


to_experts.defvjp(partial(_fwd, to_experts), partial(_bwd, to_tokens))
to_tokens.defvjp(partial(_fwd, to_tokens), partial(_bwd, to_experts))
