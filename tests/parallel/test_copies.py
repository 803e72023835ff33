"""Copies of busy experts: DeepSeek's maps, even loads, and the values and gradients of the layer without copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    ConfigError,
    InputError,
    LatentMoEConfig,
    ParallelConfig,
    RouterConfig,
    cost,
    init_params,
    latent_moe,
    param_shapes,
)
from jax_latent_moe.parallel import collapse, expand, replicate_experts
from jax_latent_moe.parallel.copies import choose_copies
from tests import cases, layers, oracle
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close, assert_trees_close

SKEWED = (3, 0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 3)
"""Twelve copies of BASE's eight experts: four of expert 3, two of expert 0."""


def with_copies(config, copies=SKEWED, **fields):
    parallel = dataclasses.replace(config.parallel, physical_to_logical=copies, **fields)
    return dataclasses.replace(config, parallel=parallel)


# Made with rebalance_experts(loads, num_physical, 1, 1, num_devices) of github.com/deepseek-ai/EPLB, d52c72d.
@pytest.mark.parametrize(
    ("loads", "num_physical", "num_devices", "expected"),
    [
        (
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            16,
            8,
            [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        ),
        ([5, 5, 5, 5, 1, 1, 100, 0], 12, 4, [6, 6, 7, 6, 0, 3, 6, 1, 4, 6, 2, 5]),
        (
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
            12,
            4,
            [5, 3, 11, 6, 9, 4, 8, 2, 10, 7, 1, 0],
        ),
    ],
)
def test_maps_are_those_of_deepseek(loads, num_physical, num_devices, expected):
    assert list(replicate_experts(loads, num_physical, num_devices)) == expected
    assert list(replicate_experts(np.int32(loads), num_physical, num_devices)) == expected


def imbalance(loads, copies, devices):
    """The busiest device's load over the mean."""
    share = np.asarray(loads, float) / np.bincount(copies)
    held = share[np.asarray(copies)].reshape(devices, -1).sum(axis=1)
    return held.max() / held.mean()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_skewed_loads_are_balanced_better(rng, exponent):
    loads = rng.permutation(1e5 / np.arange(1, 129) ** exponent)
    before = imbalance(loads, np.arange(128), 8)
    packed = imbalance(loads, replicate_experts(loads, 128, 8), 8)
    copied = imbalance(loads, replicate_experts(loads, 160, 8), 8)
    assert copied <= packed <= before
    assert copied < 1.02


@pytest.mark.parametrize(
    ("loads", "num_physical", "num_devices", "message"),
    [
        ([1, 2, 3], 2, 1, "num_physical=2 must be an integer of at least the 3 experts"),
        ([1, 2, 3], 4, 3, "multiple of the integer num_devices=3"),
        ([1, 2], 4, 2.0, "multiple of the integer num_devices=2.0"),
        ([[1, 2]], 2, 1, r"loads of shape \(1, 2\) must be one finite number"),
        ([1, np.nan], 2, 1, "finite number"),
        ([1, -1], 2, 1, "at least 0"),
        ([], 2, 1, "for each expert"),
    ],
)
def test_what_cannot_be_balanced_is_refused(loads, num_physical, num_devices, message):
    with pytest.raises(InputError, match=message):
        replicate_experts(loads, num_physical, num_devices)


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ((0, 1, 2), "name each of num_experts=8 experts at least once"),
        ((*range(8), 8), "from 0 to 8"),
        ((), "must be a sequence of integers"),
        ("01234567", "must be a sequence of integers"),
        ((0.5,), "must be an integer"),
    ],
)
def test_wrong_maps_are_refused(copies, message):
    with pytest.raises(ConfigError, match=message):
        with_copies(BASE, copies)


def test_a_map_that_devices_do_not_divide_is_refused():
    config = with_copies(BASE, (*range(8), 3))
    with jax.set_mesh(make_mesh(1, 1, 2, 1)), pytest.raises(ConfigError, match="physical_to_logical=9 must be a multi"):
        jax.eval_shape(lambda p, x: latent_moe(p, x, config), param_shapes(config), jnp.zeros((4, 16)))


@pytest.mark.parametrize("offset", [0, 3])
def test_the_tokens_of_an_expert_take_its_copies_by_turns(rng, offset):
    ids = rng.integers(-1, 8, size=(50, 3))
    ids[:20, 0] = 3
    physical = np.asarray(choose_copies(jnp.asarray(ids), SKEWED, offset))
    logical = np.asarray([*SKEWED, -1])
    np.testing.assert_array_equal(logical[physical], ids)
    for expert in range(8):
        copies = np.flatnonzero(np.asarray(SKEWED) == expert)
        taken = [copy for copy in physical.reshape(-1) if copy in copies]
        assert taken == [copies[(turn + offset) % len(copies)] for turn in range(len(taken))]


def check(case, mesh_sizes, copies=SKEWED):
    """The layer with copies against the float64 oracle of the logical experts."""
    config = case.config
    expected = case.oracle()

    @jax.jit
    def run(params, x, token_mask, dy):
        def objective(params, x):
            y, aux = latent_moe(expand(params, copies), x, config, token_mask=token_mask)
            return jnp.sum(y * dy) + sum(aux.losses.values()), (y, aux)

        (_, outputs), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
        return outputs, *grads

    params = layers.cast(case.params, "float32")
    with jax.set_mesh(make_mesh(*mesh_sizes)):
        (y, aux), dparams, dx = run(params, np.float32(case.x), case.token_mask, np.float32(case.dy))
    assert_close(y, expected.y, "float32", "y")
    np.testing.assert_array_equal(aux.tokens_per_expert, expected.tokens_per_expert)
    np.testing.assert_array_equal(aux.dropped_per_expert, expected.dropped_per_expert)
    np.testing.assert_array_equal(np.sort(aux.expert_ids), np.sort(expected.expert_ids))
    wanted_params, wanted_x = oracle.backward(case.params, config, expected, case.dy)
    assert_trees_close(dparams, wanted_params, "float32", "gradient")
    assert_close(dx, wanted_x, "float32", "gradient of x")


LOSSES = RouterConfig(switch_loss_coef=0.3, capacity_factor=1.25)


@pytest.mark.parametrize(
    ("sizes", "dispatch", "leading", "fields"),
    [
        ((1, 1, 1, 1), "auto", (5, 3), dict(router=LOSSES)),
        ((2, 1, 4, 1), "all_gather", (8, 3), dict(router=LOSSES, expert_bias=True)),
        ((1, 2, 2, 2), "all_to_all", (4, 3), dict(activation="swiglu", latent_norm="post", latent_norm_eps=1e-2)),
        ((1, 1, 4, 1), "auto", (1,), dict(activation="swiglu")),
    ],
)
def test_values_and_gradients_are_those_without_copies(rng, sizes, dispatch, leading, fields):
    config = dataclasses.replace(with_copies(BASE, dispatch=dispatch), **fields)
    case = cases.random_inputs(rng, config, leading, masked=len(leading) > 1)
    if not config.router.capacity_factor:
        case.params["router"]["bias"][2:5] += 8  # expert 3, of four copies, has every token
    check(case, sizes)


def test_rows_that_do_not_fit_are_counted_on_their_logical_experts(rng):
    """A capacity of the dispatch drops rows of copies, and the counts are those of the experts."""
    config = with_copies(BASE, dispatch="all_to_all", capacity_factor=0.5)
    case = cases.draw(rng, config, (4, 16))
    params = expand(layers.cast(case.params, "float32"), SKEWED)
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        _, aux = jax.jit(latent_moe, static_argnums=2)(params, np.float32(case.x), config)
    assert aux.dropped_per_expert.shape == (8,)
    assert 0 < aux.dropped_per_expert.sum() < aux.tokens_per_expert.sum()
    assert (aux.dropped_per_expert <= aux.tokens_per_expert).all()


def test_copies_of_parameters():
    """Drawn as copies, and taken back."""
    config = with_copies(BASE)
    drawn, logical = (init_params(jax.random.key(0), c) for c in (config, dataclasses.replace(config, parallel=None)))
    jax.tree.map(np.testing.assert_array_equal, drawn, expand(logical, SKEWED))
    jax.tree.map(np.testing.assert_array_equal, collapse(drawn, SKEWED), logical)
    assert cost.parameters(config) - cost.parameters(BASE) == 4 * 2 * 8 * 8
    assert cost.matmul_flops_per_token(config) == cost.matmul_flops_per_token(BASE)


@pytest.mark.parametrize("copies", [(0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 11), (0, 0, 0, 0, 1, 1, 1, 1)])
def test_copies_of_other_experts_are_refused(copies):
    params = init_params(jax.random.key(0), BASE)
    for change in (expand, collapse):
        with pytest.raises(InputError, match="must name each of the 8 experts, and no other"):
            change(params, copies)
    with pytest.raises(InputError, match="hold 8 experts, but physical_to_logical has 12"):
        collapse(params, SKEWED)


def test_a_map_survives_json():
    assert LatentMoEConfig.from_dict(with_copies(BASE).to_dict() | {}) == with_copies(BASE)
    assert ParallelConfig(physical_to_logical=np.arange(3)) == ParallelConfig(physical_to_logical=(0, 1, 2))


def test_the_gradient_of_copies_is_a_sum_without_scatter():
    params = {"experts": {"w_in": jnp.ones((8, 2))}}
    text = str(jax.make_jaxpr(jax.grad(lambda p: expand(p, SKEWED)["experts"]["w_in"].sum()))(params))
    assert "scatter" not in text
