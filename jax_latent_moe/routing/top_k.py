"""The k largest scores of each row: by XLA, or on a Hopper GPU by a compiled kernel.

For k above 16, XLA sorts whole rows, which took longer than a projection of the layer.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.routing.compiled import compiled_runs

MOST_SCORES = 1024
"""The most scores per row that the compiled kernel takes (custom_calls/src/routing/top_k.h)."""


def top_k_ids(scores: Float[Array, "t e"], k: int, backend: str | BackendConfig = "auto") -> Int[Array, "t k"]:
    """The columns of the k largest scores of each row, as `jax.lax.top_k` gives them: best first, ties by lower column.

    Args:
        scores: [T, E]. No gradient flows.
        k: at most E.
        backend: the experts' backend. "auto" and `CutlassBackend` use the compiled kernel if it runs here.

    Returns:
        [T, k] int32.
    """
    fits = scores.dtype == jnp.float32 and scores.shape[1] <= MOST_SCORES
    return compiled_top_k_ids(scores, k) if fits and compiled_runs(backend) else lax.top_k(scores, k)[1]


def compiled_top_k_ids(scores: Float[Array, "t e"], k: int) -> Int[Array, "t k"]:
    """`top_k_ids` by the compiled kernel, for float32 scores, at most `MOST_SCORES` per row."""
    out = jax.ShapeDtypeStruct((scores.shape[0], k), jnp.int32)
    return native.call("top_k", [scores], [out])[0]


MOST_WEIGHTS = 32
"""The most weights per row of the compiled kernel (custom_calls/src/routing/top_k.h)."""


def compiled_top_k_and_weights(
    scores: Float[Array, "t e"], logits: Float[Array, "t e"], k: int, *, sigmoid: bool, eps: float, factor: float
) -> tuple[Int[Array, "t k"], Float[Array, "t k"]]:
    """`compiled_top_k_ids`, and the weights of the choices, normalised over them, times a factor.

    Args:
        scores: [T, E] float32, to choose by.
        logits: [T, E] float32, from which the weights are computed.
        k: at most `MOST_WEIGHTS`.
        sigmoid: True for sigmoids of the logits, False for their exponentials.
        eps: added to the sum of the sigmoids; 0 for a sum of logarithms, which does not underflow.
        factor: multiplies the weights.
    """
    outs = [jax.ShapeDtypeStruct((scores.shape[0], k), dtype) for dtype in (jnp.int32, jnp.float32)]
    ids, weights = native.call("top_k_weights", [scores, logits], outs, sigmoid=sigmoid, eps=eps, factor=factor)
    return ids, weights
