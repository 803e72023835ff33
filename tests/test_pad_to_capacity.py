"""Padding to capacity: every expert has exactly its capacity of rows, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, InputError, ParallelConfig, RouterConfig, XlaBackend, latent_moe, param_shapes
from jax_latent_moe.routing.permute import ROW_MULTIPLE, filled_to_capacity, make_dispatch_plan
from tests import cases, layers
from tests.cases import TOY, with_router

PADDED = RouterConfig(capacity_factor=1.25, pad_to_capacity=True)


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1], [1, 3], [1, 0], [3, 1]],  # expert 2 has no token
        [[1, 1], [1, 1], [1, 1], [1, 1]],  # all on one
        [[-1, 3], [-1, -1], [0, -1], [4, 9]],
        [[-1, -1], [-1, -1], [-1, -1], [-1, -1]],
    ],
)
def test_the_plan_by_hand(ids):
    capacity, ids = 8, np.array([*ids, [-1, -1]])
    spare = ids.size - 1
    plan = filled_to_capacity(make_dispatch_plan(jnp.asarray(ids), 4), capacity, spare)
    np.testing.assert_array_equal(plan.group_sizes, [capacity] * 4)
    rows = np.asarray(plan.assignment_of_row)
    assert rows.shape == (4 * capacity + ROW_MULTIPLE,)
    for expert in range(4):
        own = [i for i, e in enumerate(ids.reshape(-1)) if e == expert]
        expected = own + [spare] * (capacity - len(own))
        np.testing.assert_array_equal(rows[expert * capacity : (expert + 1) * capacity], expected)
    for assignment, expert in enumerate(ids.reshape(-1)):
        row = np.asarray(plan.row_of_assignment).reshape(-1)[assignment]
        assert rows[row] == assignment if 0 <= expert < 4 else row >= 4 * capacity
    np.testing.assert_array_equal(plan.padding, rows == spare)


@pytest.mark.parametrize("method", ["blocked", "ragged_dot"])
@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 0.5, "drop_policy": "position"}, {"min_capacity": 99}])
def test_the_layer_against_the_oracle(rng, method, fields):
    config = with_router(dataclasses.replace(TOY, router=PADDED, backend=XlaBackend(method)), **fields)
    layers.check_against_oracle(cases.random_inputs(rng, config, (2, 5), masked=True))


def test_all_tokens_on_one_expert_and_a_nan_among_them(rng):
    """An expert without tokens has a zero gradient, though its padding rows run; a NaN stays in its token's row."""
    config = dataclasses.replace(
        TOY, top_k=1, router=dataclasses.replace(PADDED, norm_topk_prob=False, capacity_factor=99.0)
    )
    case = cases.draw(rng, config, (4,))._replace(expert_ids=np.full((4, 1), 5))
    case.x[2] = np.nan
    (y, _), dparams, _ = layers.run(case)
    assert np.isnan(y[2]).all()
    assert np.isfinite(np.delete(np.asarray(y), 2, axis=0)).all()
    others = np.arange(8) != 5
    assert not np.asarray(dparams["experts"]["w_in"])[others].any()
    assert not np.asarray(dparams["experts"]["w_out"])[others].any()


def test_the_rows_do_not_depend_on_the_routing():
    """Group sizes are constants of the program: capacity rows for each of the experts."""
    config = dataclasses.replace(TOY, router=PADDED, backend=XlaBackend("ragged_dot"))
    x = jax.ShapeDtypeStruct((16, 12), jnp.float32)
    text = str(jax.make_jaxpr(latent_moe, static_argnums=2)(param_shapes(config), x, config))
    assert f"f32[{8 * 8 + ROW_MULTIPLE},5]" in text  # ceil(1.25 * 16 * 3 / 8) = 8


def test_symbolic_sizes_are_refused():
    config = dataclasses.replace(TOY, router=PADDED)
    (tokens,) = jax.export.symbolic_shape("t")
    x = jax.ShapeDtypeStruct((tokens, 12), jnp.float32)
    with pytest.raises(InputError, match=r"router.pad_to_capacity needs a number of tokens that is known"):
        jax.export.export(jax.jit(latent_moe, static_argnames="config"))(param_shapes(config), x, config=config)


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(ConfigError, match=r"router.pad_to_capacity=True has no effect without capacity_factor"):
        RouterConfig(pad_to_capacity=True)
    with pytest.raises(ConfigError, match=r"router.pad_to_capacity=True needs parallel=None"):
        dataclasses.replace(TOY, router=PADDED, parallel=ParallelConfig())
