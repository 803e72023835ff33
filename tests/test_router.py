"""Only the router: hand-made choices, replay, auxiliary losses, initial gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import InputError, RouterConfig
from jax_latent_moe.config import SCORE_FUNCTIONS
from jax_latent_moe.routing.bias import update_correction_bias
from jax_latent_moe.routing.losses import auxiliary_losses
from jax_latent_moe.routing.router import route, router_logits
from tests.cases import TOY
from tests.oracle import losses as oracle_losses
from tests.oracle import router as oracle_router
from tests.tolerances import assert_close

LOGITS = np.array([[2.0, -1.0, 0.5, 1.0], [-3.0, 0.25, 0.0, -0.5]], np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def softmax(x):
    return np.exp(np.float64(x)) / np.exp(np.float64(x)).sum(axis=-1, keepdims=True)


def chosen(values, ids):
    return np.take_along_axis(values, np.asarray(ids), axis=1)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_every_score_function_takes_the_largest_logits_first(function):
    routing = route(LOGITS, RouterConfig(score_function=function, norm_topk_prob=False), 2)
    np.testing.assert_array_equal(routing.expert_ids, [[0, 3], [1, 2]])
    assert routing.expert_ids.dtype == jnp.int32
    expected = {
        "softmax": chosen(softmax(LOGITS), routing.expert_ids),
        "softmax_topk": softmax(chosen(LOGITS, routing.expert_ids)),
        "sigmoid": chosen(sigmoid(LOGITS), routing.expert_ids),
        "sqrt_softplus": np.sqrt(np.log1p(np.exp(chosen(LOGITS, routing.expert_ids)))),
    }
    assert_close(routing.weights, expected[function], "float32")


def test_softmax_then_normalise_is_softmax_over_the_chosen():
    before = route(LOGITS, RouterConfig(score_function="softmax"), 3)
    after = route(LOGITS, RouterConfig(score_function="softmax_topk"), 3)
    np.testing.assert_array_equal(before.expert_ids, after.expert_ids)
    assert_close(before.weights, after.weights, "float32")


def test_epsilon_of_the_sum():
    eps = 0.5
    plain = route(LOGITS, RouterConfig(norm_topk_prob=False), 2).weights
    normalised = route(LOGITS, RouterConfig(norm_topk_eps=eps), 2).weights
    assert_close(normalised, plain / (plain.sum(axis=1, keepdims=True) + eps), "float32")


def test_bias_is_added_to_the_score_or_to_the_logit():
    """Expert 1 of the first token needs +0.62 in score to overtake expert 0, +3 in logit."""
    bias = np.array([0, 0.7, 0, 0], np.float32)
    by_score = route(LOGITS[:1], RouterConfig(selection="score"), 1, bias=bias)
    by_logit = route(LOGITS[:1], RouterConfig(selection="logit"), 1, bias=bias)
    assert (int(by_score.expert_ids[0, 0]), int(by_logit.expert_ids[0, 0])) == (1, 0)


def test_bias_differences_near_64_survive():
    """Released biases sit near 64 and differ in the third digit behind the point."""
    bias = np.array([64.0, 64.01, 64.0, 64.0], np.float32)
    routing = route(np.zeros((1, 4), np.float32), RouterConfig(), 1, bias=bias)
    assert int(routing.expert_ids[0, 0]) == 1


def test_equal_scores_take_the_lower_index():
    routing = route(np.zeros((3, 6), np.float32), RouterConfig(), 4)
    np.testing.assert_array_equal(routing.expert_ids, [[0, 1, 2, 3]] * 3)


def test_group_score_sums_its_best():
    """Group 0 holds the single best expert, group 1 the best pair."""
    logits = np.array([[3.0, -9.0, 2.0, 2.0]], np.float32)
    best_one = route(logits, RouterConfig(num_groups=2, group_score_topk=1), 1)
    best_two = route(logits, RouterConfig(num_groups=2, group_score_topk=2), 1)
    assert (int(best_one.expert_ids[0, 0]), int(best_two.expert_ids[0, 0])) == (0, 2)


def test_groups_left_out_are_never_chosen_even_where_all_scores_are_negative():
    bias = np.array([-9.0, -9, -5, -5, -9, -9, -9, -9], np.float32)
    routing = route(np.zeros((1, 8), np.float32), RouterConfig(num_groups=4), 2, bias=bias)
    np.testing.assert_array_equal(routing.expert_ids, [[2, 3]])


def test_scale_and_factor_multiply_the_weights():
    scale = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    config = RouterConfig(per_expert_scale=True, routed_scaling_factor=2.5)
    plain = route(LOGITS, RouterConfig(), 2)
    scaled = route(LOGITS, config, 2, scale=scale)
    assert_close(scaled.weights, 2.5 * scale[plain.expert_ids] * plain.weights, "float32")
    assert_close(
        route(LOGITS, config, 2, scale=scale, routed_scaling_factor=1.0).weights * 2.5, scaled.weights, "float32"
    )


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_replay_ignores_choices_without_expert(function):
    """-1 takes no part in the sum; a token without any expert has zero weights and a zero, finite gradient."""
    ids = np.array([[3, -1, 1], [-1, -1, -1]], np.int32)
    config = RouterConfig(score_function=function, norm_topk_eps=0.0)
    routing = route(LOGITS, config, 3, expert_ids=ids)
    np.testing.assert_array_equal(routing.expert_ids, ids)
    pair = route(LOGITS[:1], config, 2, expert_ids=ids[:1, [0, 2]])
    assert_close(routing.weights[0][np.array([0, 2])], pair.weights[0], "float32")
    np.testing.assert_array_equal(routing.weights[ids == -1], 0)
    gradient = jax.grad(lambda logits: jnp.sum(route(logits, config, 3, expert_ids=ids).weights ** 2))(LOGITS)
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient)[0].any()
    assert not np.asarray(gradient)[1].any()


def test_extreme_logits_stay_finite():
    logits = np.array([[200.0, -200.0, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4]], np.float32)
    for function in ("softmax", "softmax_topk", "sigmoid"):
        config = RouterConfig(score_function=function)
        weights, gradient = jax.value_and_grad(lambda x, c=config: jnp.sum(route(x, c, 2).weights[:1] ** 2))(logits)
        assert np.isfinite(weights)
        assert np.isfinite(gradient).all(), function


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("logit", [-60.0, -90.0, -300.0, 90.0, 300.0])
def test_underflow_of_a_score_is_no_nan(function, normalised, logit):
    """One logit, chosen or not, or all of a token: gradients of weights and losses are finite, and right."""
    config = RouterConfig(
        score_function=function, norm_topk_prob=normalised, sequence_loss_coef=1.0, switch_loss_coef=1.0
    )
    low = -abs(logit)
    logits = np.array([[logit, 0, 0.1, 0.2], [low, low - 1, low + 1, low]], np.float32)

    def loss(logits):
        weights = route(logits, config, 2).weights
        return jnp.sum(weights * jnp.array([1.0, 3.0])) + sum(auxiliary_losses(logits[None], config, 2)[0].values())

    gradient = jax.grad(loss)(logits)
    assert np.isfinite(gradient).all()
    layer = dataclasses.replace(TOY, num_experts=4, top_k=2, router=config)
    exact = np.zeros((2, 4))
    for row, ids in enumerate(np.asarray(route(logits, config, 2).expert_ids)):
        _, saved = oracle_router.weigh(layer, np.float64(logits[row]), ids, np.ones(4))
        exact[row], _ = oracle_router.weigh_backward(
            layer, np.float64(logits[row]), np.ones(4), saved, np.array([1, 3])
        )
    _, gradients, *_ = oracle_losses.losses(layer, np.float64(logits)[None], np.ones((1, 2), bool))
    exact += sum(gradients.values())[0]
    np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_weights_of_scores_that_underflow_still_have_a_ratio(function):
    """Replayed ids that the scores did not choose, without an epsilon."""
    config = RouterConfig(score_function=function, norm_topk_eps=0.0)
    shift = 0.0 if function.startswith("softmax") else -200.0
    logits = np.array([[90 + shift, shift, shift + 0.1, shift + 0.2]], np.float32)
    ids = np.array([[1, 2]])
    weights, gradient = jax.value_and_grad(lambda a: route(a, config, 2, expert_ids=ids).weights[0, 0])(logits)
    by_root = 0.05 if function == "sqrt_softplus" else 0.1  # exp(a / 2) where exp(a) is small
    assert float(weights) == pytest.approx(sigmoid(-by_root), rel=1e-5)
    slope = sigmoid(by_root) * sigmoid(-by_root) * by_root / 0.1
    np.testing.assert_allclose(gradient, [[0, slope, -slope, 0]], rtol=1e-5)


def test_router_matmul_in_its_own_dtype(rng):
    x, kernel = rng.normal(size=(5, 16)), rng.normal(size=(16, 4))
    logits = router_logits(jnp.bfloat16(x), jnp.float32(kernel), "float32")
    assert logits.dtype == jnp.float32
    assert_close(logits, np.float64(jnp.bfloat16(x)) @ np.float32(kernel).astype(np.float64), "float32")
    narrow = router_logits(jnp.float32(x), jnp.float32(kernel), "bfloat16")
    assert narrow.dtype == jnp.float32
    assert_close(narrow, np.float64(jnp.bfloat16(x)) @ np.float64(jnp.bfloat16(kernel)), "float32")


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_losses_at_perfect_balance_are_their_coefficients(function):
    """Each expert takes as many tokens and as much probability as any other."""
    logits = np.stack([np.roll([4.0, 1.0, -1.0, -2.0], shift) for shift in range(4)])[None].astype(np.float32)
    config = RouterConfig(score_function=function, switch_loss_coef=0.5, sequence_loss_coef=0.25)
    losses, _ = auxiliary_losses(logits, config, 2)
    np.testing.assert_allclose([losses["switch"], losses["sequence"], losses["z"]], [0.5, 0.25, 0], rtol=1e-6)


def test_one_sequence_alone_decides_its_loss():
    """Two opposite sequences balance over the batch, not within themselves."""
    one = np.tile(np.array([5.0, 5.0, -5.0, -5.0], np.float32), (3, 1))
    logits = np.stack([one, one[:, ::-1]])
    losses, _ = auxiliary_losses(
        logits, RouterConfig(score_function="softmax", switch_loss_coef=1.0, sequence_loss_coef=1.0), 2
    )
    assert float(losses["switch"]) == pytest.approx(1.0, rel=1e-3)
    assert float(losses["sequence"]) == pytest.approx(2.0, rel=1e-3)


def test_z_loss_by_hand():
    losses, _ = auxiliary_losses(np.zeros((1, 3, 4), np.float32), RouterConfig(z_loss_coef=2.0), 1)
    assert float(losses["z"]) == pytest.approx(2 * np.log(4) ** 2)


def test_bias_moves_against_the_load():
    rate = RouterConfig().bias_update_rate
    updated = update_correction_bias(jnp.zeros(4), jnp.array([5, 1, 3, 3]), rate)
    assert updated.dtype == jnp.float32
    assert_close(updated, rate * np.array([-1, 1, 0, 0]), "float32")


@pytest.mark.parametrize("size", [2**24, 2**30, 2**31 - 9])
def test_bias_tells_single_counts_apart(size):
    """float32 has no 2^24 + 1, and int32 no sum of these."""
    counts = np.full(8, size)
    counts[3] += 1
    updated = update_correction_bias(jnp.zeros(8), counts.astype(np.int32), 1.0)
    np.testing.assert_array_equal(updated, np.where(np.arange(8) == 3, -1, 1))
    np.testing.assert_array_equal(update_correction_bias(jnp.zeros(8), np.full(8, size, np.int32), 1.0), 0)


def test_bias_is_updated_from_counts_alone():
    with pytest.raises(InputError, match="tokens_per_expert of dtype float32 must be integers"):
        update_correction_bias(jnp.zeros(2), jnp.array([0.5, 0.5]), 1.0)


def test_repeated_bias_updates_even_the_load(rng):
    """Auxiliary-loss-free balancing on fixed logits that favour one expert: the load's spread shrinks."""
    logits = jnp.float32(rng.normal(size=(256, 8)) + np.linspace(0, 2, 8))
    config = dataclasses.replace(RouterConfig(), bias_update_rate=1e-2)

    @jax.jit
    def step(bias):
        ids = route(logits, config, 2, bias=bias).expert_ids
        counts = jnp.zeros(8, jnp.int32).at[ids.reshape(-1)].add(1)
        return update_correction_bias(bias, counts, config.bias_update_rate), counts

    bias, before = step(jnp.zeros(8))
    for _ in range(100):
        bias, after = step(bias)
    assert float(jnp.std(after)) < 0.2 * float(jnp.std(before))
