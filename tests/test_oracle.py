"""The oracle against itself: hand-written gradients against finite differences, values against hand calculations."""

import dataclasses

import numpy as np
import pytest

from jax_latent_moe.activations import ACTIVATIONS
from jax_latent_moe.config import LATENT_NORMS, SCORE_FUNCTIONS, LatentMoEConfig, RouterConfig
from tests import cases, oracle

STEP = 1e-6


def objective(case) -> float:
    result = case.oracle()
    return float(np.sum(result.y * case.dy)) + sum(result.losses.values())


def directional(case, change):
    """Central difference of the objective along `change(case, step)`."""
    return (objective(change(case, STEP)) - objective(change(case, -STEP))) / (2 * STEP)


def assert_slope(gradient, direction, slope):
    rounding = 1e-6 * (1 + np.linalg.norm(gradient) * np.linalg.norm(direction))
    assert abs(np.sum(gradient * direction) - slope) <= rounding


def check_gradients(rng, case):
    grads, dx = oracle.backward(case.params, case.config, case.oracle(), case.dy)
    direction = rng.normal(size=case.x.shape)
    slope = directional(case, lambda c, step: c._replace(x=c.x + step * direction))
    assert_slope(dx, direction, slope)
    for part, leaves in case.params.items():
        for name, value in leaves.items():
            direction = rng.normal(size=value.shape)

            def move(c, step, part=part, name=name, direction=direction):
                moved = c.params[part] | {name: c.params[part][name] + step * direction}
                return c._replace(params=c.params | {part: moved})

            slope = directional(case, move)
            assert_slope(grads[part][name], direction, slope)


@pytest.mark.parametrize("index", range(30))
def test_gradients_of_random_layers(rng, index):
    check_gradients(rng, cases.random_case(rng))


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_score_function_and_activation(rng, function, activation):
    for norm in LATENT_NORMS:
        eps = {} if norm == "none" else {"latent_norm_eps": 1e-2}
        config = dataclasses.replace(cases.TOY, activation=activation, latent_norm=norm, **eps)
        coefficients = dict(switch_loss_coef=1.0, sequence_loss_coef=1.0, z_loss_coef=1.0, per_expert_scale=True)
        config = cases.with_router(config, score_function=function, **coefficients)
        check_gradients(rng, cases.random_inputs(rng, config, (2, 3), masked=True))


def test_one_expert_by_hand():
    """If d = l = E = k = 1, y = weight * w_out * relu(w_in * z)^2 * up, and a softmax of one logit is 1."""
    config = LatentMoEConfig(
        hidden_size=1, latent_size=1, num_experts=1, top_k=1, expert_intermediate_size=1,
        router=RouterConfig(
            score_function="softmax", norm_topk_prob=False, correction_bias=False, z_loss_coef=1.0, switch_loss_coef=0.5
        ),
        dtype="float64",
    )  # fmt: skip
    params = {
        "router": {"kernel": np.full((1, 1), 3.0)},
        "down_proj": {"kernel": np.full((1, 1), 2.0)},
        "experts": {"w_in": np.full((1, 1, 1), 5.0), "w_out": np.full((1, 1, 1), 0.5)},
        "up_proj": {"kernel": np.full((1, 1), 7.0)},
    }
    result = oracle.forward(params, np.full((1, 1), 1.0), config)
    assert result.y == pytest.approx(10.0**2 * 0.5 * 7.0)
    assert result.weights == pytest.approx(1.0)
    assert result.losses == pytest.approx({"switch": 0.5, "sequence": 0.0, "z": 9.0})


def test_perfect_balance_costs_the_coefficient():
    config = LatentMoEConfig(
        hidden_size=4, latent_size=None, num_experts=4, top_k=1, expert_intermediate_size=1,
        dtype="float64",
        router=RouterConfig(
            score_function="softmax", norm_topk_prob=False, correction_bias=False, switch_loss_coef=0.7
        ),
    )  # fmt: skip
    params = cases.random_params(np.random.default_rng(0), config) | {"router": {"kernel": 9 * np.eye(4)}}
    assert oracle.forward(params, np.eye(4), config).losses["switch"] == pytest.approx(0.7)


def test_masked_groups_are_never_chosen_even_with_negative_bias():
    config = dataclasses.replace(cases.TOY, top_k=2)
    config = cases.with_router(config, num_groups=4, topk_groups=1, group_score_topk=2)
    params = cases.random_params(np.random.default_rng(0), config)
    params["router"]["bias"] = np.array([-9.0, -9, -5, -5, -9, -9, -9, -9])
    ids = oracle.forward(params, np.ones((1, 12)), config).expert_ids
    assert set(ids[0]) == {2, 3}


def test_bias_update_by_hand():
    updated = oracle.update_correction_bias([0.0, 1.0, -1.0, 0.5], [4, 0, 2, 2], 0.25)
    np.testing.assert_array_equal(updated, [-0.25, 1.25, -1.0, 0.5])
