"""The compiled choice of the best scores on a Hopper GPU, against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.native import library
from jax_latent_moe.routing.top_k import MOST_SCORES, top_k_ids
from tests.gpu.grouped import needs_hopper

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]


@pytest.mark.parametrize(
    ("rows", "experts", "k"),
    [
        (8192, 512, 22),
        (1, 512, 22),
        (3, 1, 1),
        (5, 33, 33),
        (70, 64, 40),
        (9, 130, 1),
        (256, 896, 16),
        (257, 512, 22),
        (2, MOST_SCORES, 64),
    ],
)
def test_it_is_a_stable_sort_from_the_best(rng, rows, experts, k):
    """Equal scores, both signs, both infinities; the kernel is what runs."""
    scores = np.round(rng.normal(size=(rows, experts)), 1).astype(np.float32) + np.float32(0)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[rng.random(scores.shape) < 0.01] = np.inf
    function = jax.jit(top_k_ids, static_argnums=1).lower(jnp.asarray(scores), k)
    assert "latent_moe_top_k" in function.as_text()
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(function.compile()(jnp.asarray(scores)), expected)


def test_it_orders_as_xla_does(rng):
    """NaN and zeros of either sign too."""
    scores = rng.choice(np.float32([np.nan, -0.0, 0.0, 1.0, -1.0, 1e-40]), size=(50, 100))
    np.testing.assert_array_equal(top_k_ids(jnp.asarray(scores), 30), jax.lax.top_k(jnp.asarray(scores), 30)[1])
