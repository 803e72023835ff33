"""The k largest scores of each row: by XLA, or on a Hopper GPU by a compiled kernel.

XLA sorts whole rows where k is above 16, which took longer than a projection of the layer.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.routing.compiled import compiled_runs

MOST_SCORES = 1024
"""Scores of a row in the compiled kernel (custom_calls/src/routing/top_k.h)."""


def top_k_ids(scores: Float[Array, "t e"], k: int, backend: str | BackendConfig = "auto") -> Int[Array, "t k"]:
    """Columns of the k largest scores of each row, best first, of equal ones the lower first, as `jax.lax.top_k`.

    Args:
        scores: [T, E]; no gradient flows.
        k: at most E.
        backend: of the experts. "auto" and `CutlassBackend` take the compiled kernel where it runs.

    Returns:
        [T, k] int32.
    """
    fits = scores.dtype == jnp.float32 and scores.shape[1] <= MOST_SCORES
    return compiled_top_k_ids(scores, k) if fits and compiled_runs(backend) else lax.top_k(scores, k)[1]


def compiled_top_k_ids(scores: Float[Array, "t e"], k: int) -> Int[Array, "t k"]:
    """The same of float32 scores, at most `MOST_SCORES` a row, by the compiled kernel."""
    out = jax.ShapeDtypeStruct((scores.shape[0], k), jnp.int32)
    return native.call("top_k", [scores], [out])[0]
