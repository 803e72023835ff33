"""The compiled sort of the experts' choices on a Hopper GPU, against NumPy's stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.native import library
from jax_latent_moe.routing.expert_sort import CHUNK, MOST_EXPERTS, count_experts, sort_by_expert
from tests.gpu.grouped import needs_hopper

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]


def check(ids, num_experts):
    function = jax.jit(sort_by_expert, static_argnums=1).lower(jnp.asarray(ids), num_experts)
    assert "latent_moe_sort" in function.as_text()
    found = function.compile()(jnp.asarray(ids))
    flat = ids.reshape(-1).astype(np.int64)
    expert = np.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = np.argsort(expert, kind="stable")
    rows = np.empty_like(order)
    rows[order] = np.arange(order.size)
    np.testing.assert_array_equal(found.sizes, np.bincount(expert, minlength=num_experts + 1)[:num_experts])
    np.testing.assert_array_equal(found.assignment_of_row, order)
    np.testing.assert_array_equal(found.row_of_assignment, rows)
    np.testing.assert_array_equal(count_experts(jnp.asarray(ids), num_experts), found.sizes)


@pytest.mark.parametrize(
    ("shape", "num_experts"),
    [
        ((8192, 22), 512),
        ((1, 22), 512),
        ((0, 22), 512),
        ((CHUNK,), 1),
        ((4 * CHUNK + 1,), 31),
        ((1000, 16), 896),
        ((40 * CHUNK, 9), MOST_EXPERTS),
    ],
)
def test_it_is_a_stable_sort(rng, shape, num_experts):
    """Ids of no expert on either side among them."""
    check(rng.integers(-2, num_experts + 2, size=shape).astype(np.int32), num_experts)


@pytest.mark.parametrize("expert", [0, 4, 8, -1])
def test_all_choices_of_one_expert(expert):
    check(np.full((777, 11), expert, np.int32), 8)


def test_ids_at_the_ends_of_their_type():
    check(np.asarray([2**31 - 1, -(2**31), 3, 0], np.int32), 4)
