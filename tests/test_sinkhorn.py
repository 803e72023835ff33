"""Sinkhorn routing against Megatron's iteration in NumPy, and the options that it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, RouterConfig
from jax_latent_moe.routing.router import route
from jax_latent_moe.routing.sinkhorn import balanced_scores
from tests import cases, layers
from tests.cases import TOY
from tests.oracle import router as oracle_router

SINKHORN = RouterConfig(selection="sinkhorn", score_function="softmax", norm_topk_prob=False, correction_bias=False)


def megatron(cost, tolerance=1e-4):
    """megatron/core/transformer/moe/moe_utils.py, sinkhorn: only the formula, in float64."""
    cost = np.exp(np.float64(cost))
    d1, error = np.ones(cost.shape[1]), np.inf
    while error > tolerance:
        d0 = 1 / (cost.shape[0] * (cost @ d1 + 1e-8))
        new = 1 / (cost.shape[1] * (d0 @ cost + 1e-8))
        error, d1 = np.abs(d1 - new).mean(), new
    return d1 * cost * d0[:, None]


def test_the_scores_are_megatrons_up_to_a_factor_per_token(rng):
    logits = np.float32(rng.normal(size=(20, 6)) + np.linspace(0, 2, 6))
    found, expected = np.float64(balanced_scores(logits)), np.log(megatron(logits))
    difference = found - expected
    np.testing.assert_allclose(difference, np.broadcast_to(difference[:, :1], difference.shape), atol=1e-3)


def test_it_evens_the_load_out(rng):
    """Expert 3 has the largest logit of every token; each of 4 experts gets a quarter of 400 tokens."""
    logits = np.float32(rng.normal(size=(400, 4)) + np.array([0, 0, 0, 6]))
    counts = np.bincount(np.asarray(route(logits, SINKHORN, 1).expert_ids)[:, 0], minlength=4)
    assert counts.max() <= 130


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_layer_against_the_oracle(rng, top_k):
    """Weights are Megatron's: sigmoid scores with one expert, else the softmax over all, not normalised again."""
    router = dataclasses.replace(SINKHORN, score_function="sigmoid" if top_k == 1 else "softmax")
    layers.check_against_oracle(
        cases.random_inputs(rng, dataclasses.replace(TOY, top_k=top_k, router=router), (2, 4), masked=True)
    )


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0, 1e4])
def test_large_logits_stay_finite(rng, shift):
    """A factor per token changes nothing, and exp overflows at 89 in float32."""
    logits = np.float32(rng.integers(-8, 8, (10, 5)) / 4)
    shifted = logits + np.float32(shift) * (np.arange(10)[:, None] % 2)
    np.testing.assert_array_equal(route(shifted, SINKHORN, 2).expert_ids, route(logits, SINKHORN, 2).expert_ids)


def test_masked_tokens_have_no_part(rng):
    """Also where their logits are huge, and where every token is masked."""
    logits, mask = np.float32(rng.normal(size=(9, 5))), np.arange(9) % 3 > 0
    other = np.where(mask[:, None], logits, 1e4 * np.eye(5)[0]).astype(np.float32)
    ids = route(logits, SINKHORN, 2, token_mask=mask).expert_ids
    np.testing.assert_array_equal(route(other, SINKHORN, 2, token_mask=mask).expert_ids, ids)
    wanted, _ = oracle_router.sinkhorn(np.float64(logits), mask)
    np.testing.assert_array_equal(np.sort(ids[mask]), np.sort(np.argsort(-wanted[mask])[:, :2]))
    assert (np.asarray(route(logits, SINKHORN, 2, token_mask=np.zeros(9, bool)).expert_ids) == -1).all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_single_real_token_chooses_by_its_logits(rng, tokens):
    """Its factors make all experts equal, and rounding would choose."""
    logits, mask = np.float32(rng.normal(size=(tokens, 8))), np.arange(tokens) == tokens - 1
    ids = route(logits, SINKHORN, 2, token_mask=mask).expert_ids
    np.testing.assert_array_equal(ids[-1], np.argsort(-logits[-1])[:2])


def test_no_gradient_flows_through_the_choice(rng):
    logits = jnp.float32(rng.normal(size=(6, 4)))
    gradient = jax.grad(lambda a: jnp.sum(balanced_scores(a)))(logits)
    assert not gradient.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"correction_bias": True},
            "router.correction_bias=True has no effect with router.selection='sinkhorn': set it to False",
        ),
        ({"num_groups": 2}, "router.num_groups=2 has no effect with router.selection='sinkhorn': set it to 1"),
        ({"round_to_tile": 4}, "router.round_to_tile=4 and router.selection='sinkhorn' both balance the experts"),
    ],
)
def test_what_it_does_not_go_with_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SINKHORN, **fields)
