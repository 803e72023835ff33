"""Dispatch plans whose experts begin at multiples of rows: against a loop, and through the layer."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    LatentMoEConfig,
    RouterConfig,
    init_params,
    latent_moe,
    lora,
    merge_state,
    quantize,
    split_state,
)
from jax_latent_moe.formats import FORMATS
from jax_latent_moe.routing.permute import first_rows, make_dispatch_plan
from tests.conformance.test_new_rows import COLUMNS
from tests.tolerances import assert_close

EXPERTS, TOKENS, K = 4, 5, 3
TARGETS = "experts/w_in", "experts/w_out"
LAYERS = {
    "relu2": LatentMoEConfig(12, 4, 24, 10, 5, dtype="float32"),
    "swiglu": LatentMoEConfig(12, 4, 6, 2, 5, activation="swiglu", dtype="float32"),
    "capacity": LatentMoEConfig(12, 4, 6, 2, 5, router=RouterConfig(capacity_factor=0.5), dtype="float32"),
}
ids = hnp.arrays(np.int32, (TOKENS, K), elements=st.integers(-1, EXPERTS))


@hypothesis.given(ids, st.sampled_from([1, 2, 3, 8]))
def test_experts_begin_at_multiples(expert_ids, multiple):
    plan = jax.jit(make_dispatch_plan, static_argnums=(1, 2, 3))(expert_ids, EXPERTS, "auto", multiple)
    flat = expert_ids.reshape(-1)
    rows, padding = [], []
    for expert in range(EXPERTS):
        own = list(np.flatnonzero(flat == expert))
        fill = -len(own) % multiple
        rows += own + own[-1:] * fill
        padding += [False] * len(own) + [True] * fill
        assert plan.group_sizes[expert] == len(own) + fill
    taken = np.asarray(plan.assignment_of_row)
    np.testing.assert_array_equal(taken[: len(rows)], rows)
    if multiple > 1:
        np.testing.assert_array_equal(plan.padding[: len(rows)], padding)
    for assignment, row in enumerate(np.asarray(plan.row_of_assignment).reshape(-1)):
        assert taken[row] == assignment
        assert plan.padding is None or not plan.padding[row]
    weights = np.arange(1.0, TOKENS * K + 1, dtype=np.float32).reshape(TOKENS, K)
    expected = np.where(padding, 0, weights.reshape(-1)[rows]) if rows else np.zeros(0)
    np.testing.assert_array_equal(plan.weights_of_rows(weights)[: len(rows)], expected)


def test_one_is_the_plan_without_padding():
    expert_ids = jnp.asarray([[0, 2], [2, 1]])
    plan = make_dispatch_plan(expert_ids, 3, row_multiple=1)
    assert plan.padding is None
    assert plan.assignment_of_row.shape == (4,)


def test_a_cut_plan_keeps_the_padding():
    plan = make_dispatch_plan(jnp.asarray([[0, 5], [2, 5], [2, 5], [0, 5]]), 3, row_multiple=4)
    cut = first_rows(plan, 4)
    assert cut.assignment_of_row.shape == cut.padding.shape
    assert int(jnp.sum(cut.group_sizes)) == 8 <= cut.assignment_of_row.size
    np.testing.assert_array_equal(cut.assignment_of_row[:8], plan.assignment_of_row[:8])


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_layer_gives_the_same_with_padding_rows(rng, monkeypatch, layer, adapted):
    """A format that asks for multiples of 8 rows gives what the same codes give without."""
    monkeypatch.setitem(FORMATS, "columns8", COLUMNS)
    monkeypatch.setitem(FORMATS, "columns8-rows", dataclasses.replace(COLUMNS, name="columns8-rows", row_multiple=8))
    config = LAYERS[layer]
    params = init_params(jax.random.key(0), config)
    x = jnp.asarray(rng.normal(size=(2, 7, config.hidden_size)), jnp.float32)
    x = x.at[1, 3].set(jnp.nan)
    mask = jnp.ones((2, 7), bool).at[1, 3].set(False)

    def run(name):
        layer = quantize(params, config, name)
        if adapted:
            layer = lora.adapt(jax.random.key(1), layer, config, rank=2, alpha=2, targets=TARGETS)
            for name, leaf in layer["experts"].items():
                layer["experts"][name] = dataclasses.replace(leaf, b=leaf.b + 0.1)
        trained, state = split_state(layer)

        def loss(trained, x):
            y, aux = latent_moe(merge_state(trained, state), x, config, token_mask=mask)
            return jnp.sum(jnp.sin(y)), (y, aux.tokens_per_expert)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(trained, x)

    (_, (y, counts)), gradients = run("columns8")
    (_, (padded_y, padded_counts)), padded_gradients = run("columns8-rows")
    assert_close(padded_y, y, "float32")
    np.testing.assert_array_equal(padded_counts, counts)
    jax.tree.map(lambda padded, plain: assert_close(padded, plain, "float32"), padded_gradients, gradients)
