"""The plan, the gather, the combine and the capacity against plain loops."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.device import Device
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.routing.expert_sort import count_experts
from jax_latent_moe.routing.permute import (
    combine,
    first_rows,
    make_dispatch_plan,
    rows_of,
    within_capacity,
)
from tests.tolerances import assert_close

EXPERTS, TOKENS, K, WIDTH = 4, 5, 3, 2

# Ids that reach no expert, on either side, among them.
ids = hnp.arrays(np.int32, (TOKENS, K), elements=st.integers(-1, EXPERTS))
weights = hnp.arrays(np.float32, (TOKENS, K), elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]))
plan_of = jax.jit(make_dispatch_plan, static_argnums=1)
capacity_of = jax.jit(within_capacity, static_argnums=(2, 3, 4))


@hypothesis.given(ids)
def test_rows_are_sorted_by_expert_in_token_order(expert_ids):
    plan = plan_of(expert_ids, EXPERTS)
    flat = expert_ids.reshape(-1)
    valid = (flat >= 0) & (flat < EXPERTS)
    expected = [s for e in range(EXPERTS) for s in np.flatnonzero(flat == e)] + list(np.flatnonzero(~valid))
    np.testing.assert_array_equal(plan.assignment_of_row, expected)
    np.testing.assert_array_equal(np.asarray(plan.row_of_assignment).reshape(-1)[expected], np.arange(TOKENS * K))
    np.testing.assert_array_equal(plan.group_sizes, np.bincount(flat[valid], minlength=EXPERTS))
    np.testing.assert_array_equal(plan.token_of_row, np.array(expected) // K)
    assert {leaf.dtype for leaf in jax.tree.leaves(plan)} == {np.dtype(np.int32)}
    assert plan.padding is None


@hypothesis.given(ids, weights)
def test_gather_then_combine_weighs_each_token_by_its_sum(expert_ids, weight):
    tokens = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)
    plan = plan_of(expert_ids, EXPERTS)
    rows = gathered(rows_of(jnp.asarray(tokens), plan))
    np.testing.assert_array_equal(rows, tokens[np.asarray(plan.assignment_of_row) // K])
    assert_close(combine(rows, plan, weight), tokens * weight.sum(axis=1, keepdims=True), "float32")
    assert_close(combine(rows, plan), tokens * K, "float32")
    weighted = gathered(rows_of(jnp.asarray(tokens), plan, jnp.asarray(weight)))
    assert_close(combine(weighted, plan), tokens * weight.sum(axis=1, keepdims=True), "float32")


def test_rows_are_weighted_in_float32():
    """A weight of 1 + 2^-8, which bfloat16 rounds to 1, still moves 1.5 to the next bfloat16 number."""
    plan = make_dispatch_plan(jnp.zeros((1, 1), jnp.int32), 1)
    rows = gathered(rows_of(jnp.full((1, 1), 1.5, jnp.bfloat16), plan, jnp.full((1, 1), 1 + 2**-8, jnp.float32)))
    assert rows.dtype == jnp.bfloat16
    assert float(rows[0, 0]) == 1.5078125


def test_combine_sums_narrow_rows_in_float32():
    plan = make_dispatch_plan(jnp.zeros((1, 256), jnp.int32), 1)
    rows = jnp.full((256, 1), 1 + 2**-7, jnp.bfloat16)
    total = combine(rows, plan, jnp.ones((1, 256), jnp.float32))
    assert total.dtype == jnp.float32
    assert float(total[0, 0]) == 256 * (1 + 2**-7)


@hypothesis.given(ids)
def test_counts(expert_ids):
    counts = count_experts(jnp.asarray(expert_ids), EXPERTS)
    np.testing.assert_array_equal(counts, [(expert_ids == e).sum() for e in range(EXPERTS)])


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 2, 15])
@hypothesis.settings(max_examples=40)
@hypothesis.given(ids, weights)
def test_capacity_keeps_the_best_or_the_first(policy, capacity, expert_ids, weight):
    kept = np.asarray(capacity_of(expert_ids, weight, EXPERTS, capacity, policy)).reshape(-1)
    flat, flat_weight = expert_ids.reshape(-1), weight.reshape(-1)
    expected = np.zeros(TOKENS * K, bool)
    for expert in range(EXPERTS):
        rows = list(np.flatnonzero(flat == expert))
        if policy == "probs":
            rows.sort(key=lambda row: -flat_weight[row])
        expected[rows[:capacity]] = True
    np.testing.assert_array_equal(kept, expected)


@hypothesis.given(ids, weights, st.integers(0, TOKENS * K))
def test_a_plan_cut_to_the_rows_of_experts_combines_to_the_same(expert_ids, weight, spare):
    plan = plan_of(expert_ids, EXPERTS)
    num_rows = min(int(plan.group_sizes.sum()) + spare, TOKENS * K - 1)
    hypothesis.assume(num_rows >= plan.group_sizes.sum())
    cut = first_rows(plan, num_rows)
    assert num_rows < cut.assignment_of_row.size <= min(num_rows + 8, TOKENS * K)
    values = np.random.default_rng(0).normal(size=(TOKENS * K, WIDTH)).astype(np.float32)
    values[int(plan.group_sizes.sum()) :] = 0  # as grouped matmuls leave them
    whole = combine(jnp.asarray(values), plan, jnp.asarray(weight))
    np.testing.assert_array_equal(
        combine(jnp.asarray(values[: cut.assignment_of_row.size]), cut, jnp.asarray(weight)), whole
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_on_a_gpu_are_the_same_rows(rng, weighted):
    """Infinities and NaN included; an odd width has no pairs."""
    ids = jnp.asarray(rng.integers(-1, EXPERTS, size=(TOKENS, K)))
    weights, plan = jnp.asarray(rng.normal(size=ids.shape), jnp.float32), make_dispatch_plan(ids, EXPERTS)
    for width in (6, 7):
        tokens = rng.normal(size=(TOKENS, width)).astype(np.float32)
        tokens[0, :3] = np.inf, -np.inf, np.nan
        tokens = jnp.asarray(tokens, jnp.bfloat16)

        rows = rows_of(tokens, plan, weights if weighted else None)
        expected, found = (gathered(rows, device) for device in (Device("cpu", "cpu"), Device("gpu", "NVIDIA H200")))
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
