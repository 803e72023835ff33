"""Laws that hold for any input: symmetries of the layer and sums of its loads."""

import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np

from jax_latent_moe import RouterConfig, latent_moe, update_correction_bias
from tests import cases, oracle
from tests.cases import TOY
from tests.layers import cast
from tests.tolerances import assert_close, assert_trees_close

TOKENS = 6
CONFIG = dataclasses.replace(
    TOY,
    router=RouterConfig(
        num_groups=4, topk_groups=2, routed_scaling_factor=2.5, switch_loss_coef=0.1, z_loss_coef=0.1,
        sequence_loss_coef=0.1, per_expert_scale=True,
    ),
)  # fmt: skip

seeds = st.integers(0, 2**32 - 1)
permutations = functools.partial(lambda n: st.permutations(range(n)).map(np.array))
# Few values, so that zeros and equal tokens are common.
tokens = hnp.arrays(np.float32, (TOKENS, TOY.hidden_size), elements=st.integers(-8, 8).map(lambda n: n / 4))
masks = hnp.arrays(bool, TOKENS)


@functools.cache
def layer():
    return jax.jit(functools.partial(latent_moe, config=CONFIG))


@functools.cache
def fixed_params():
    return cases.random_params(np.random.default_rng(0), CONFIG)


def run(x, token_mask=None, expert_ids=None, params=None):
    mask = np.ones(len(x), bool) if token_mask is None else token_mask
    return layer()(cast(params or fixed_params(), "float32"), np.float32(x), token_mask=mask, expert_ids=expert_ids)


@hypothesis.given(tokens, masks, permutations(TOKENS))
def test_permuting_tokens_permutes_outputs(x, mask, order):
    y, aux = run(x, mask)
    permuted, permuted_aux = run(x[order], mask[order])
    assert_close(permuted, y[order], "float32")
    np.testing.assert_array_equal(permuted_aux.expert_ids, aux.expert_ids[order])
    np.testing.assert_array_equal(permuted_aux.tokens_per_expert, aux.tokens_per_expert)
    assert_trees_close(permuted_aux.losses, aux.losses, "float32")


@hypothesis.given(seeds, permutations(4), st.booleans())
def test_permuting_experts_changes_nothing_but_their_names(seed, groups, flip):
    """Groups as wholes, and the two experts within each."""
    case = cases.random_inputs(np.random.default_rng(seed), CONFIG, (TOKENS,))
    within = [1, 0] if flip else [0, 1]
    order = np.array([2 * group + i for group in groups for i in within])  # new expert e is the old order[e]
    router = {
        "kernel": case.params["router"]["kernel"][:, order],
        "bias": case.params["router"]["bias"][order],
        "scale": case.params["router"]["scale"][order],
    }
    experts = {name: kernel[order] for name, kernel in case.params["experts"].items()}
    y, aux = run(case.x, params=case.params)
    renamed, renamed_aux = run(case.x, params=case.params | {"router": router, "experts": experts})
    assert_close(renamed, y, "float32")
    np.testing.assert_array_equal(order[renamed_aux.expert_ids], aux.expert_ids)
    np.testing.assert_array_equal(renamed_aux.tokens_per_expert, aux.tokens_per_expert[order])
    assert_trees_close(renamed_aux.losses, aux.losses, "float32")


@hypothesis.given(tokens, masks)
def test_loads_and_weights_add_up(x, mask):
    _, aux = run(x, mask)
    ids, weights = np.asarray(aux.expert_ids), np.asarray(aux.weights)
    assert int(aux.tokens_per_expert.sum()) == mask.sum() * CONFIG.top_k
    counts = np.bincount(ids[ids >= 0], minlength=CONFIG.num_experts)
    np.testing.assert_array_equal(aux.tokens_per_expert, counts)
    for token, (chosen, weight) in enumerate(zip(ids, weights, strict=True)):
        if not mask[token]:
            assert (chosen == -1).all()
            assert not weight.any()
            continue
        assert len(set(chosen)) == CONFIG.top_k
        assert len({expert // 2 for expert in chosen}) <= CONFIG.router.topk_groups
        unscaled = weight / fixed_params()["router"]["scale"][chosen]
        assert (unscaled >= 0).all()
        np.testing.assert_allclose(unscaled.sum(), CONFIG.router.routed_scaling_factor, rtol=1e-5)
    assert not np.asarray(aux.dropped_per_expert).any()


@hypothesis.given(tokens, masks)
def test_replaying_the_choice_changes_nothing(x, mask):
    y, aux = run(x, mask)
    again, again_aux = run(x, mask, np.asarray(aux.expert_ids))
    np.testing.assert_array_equal(again, y)
    jax.tree.map(np.testing.assert_array_equal, again_aux, aux)


@hypothesis.given(tokens)
def test_masked_tokens_are_as_if_absent(x):
    tokens = TOKENS // 2
    y, aux = run(x[:tokens])
    padded, padded_aux = run(x, np.arange(TOKENS) < tokens)
    assert_close(padded[:tokens], y, "float32")
    assert_trees_close(padded_aux.losses, aux.losses, "float32")
    np.testing.assert_array_equal(padded_aux.expert_ids[:tokens], aux.expert_ids)
    np.testing.assert_array_equal(padded_aux.tokens_per_expert, aux.tokens_per_expert)


@hypothesis.given(tokens, tokens)
def test_tokens_do_not_see_each_other(first, second):
    """Another batch behind the same first half does not change that half's output."""
    mixed = np.concatenate([first[: TOKENS // 2], second[TOKENS // 2 :]])
    (y, aux), (mixed_y, mixed_aux) = run(first), run(mixed)
    half = slice(TOKENS // 2)
    assert_close(mixed_y[half], y[half], "float32")
    np.testing.assert_array_equal(mixed_aux.expert_ids[half], aux.expert_ids[half])


@hypothesis.given(seeds, st.floats(-50, 50))
def test_a_constant_on_the_bias_never_changes_the_choice(seed, constant):
    case = cases.random_inputs(np.random.default_rng(seed), CONFIG, (TOKENS,))
    router = case.params["router"] | {"bias": case.params["router"]["bias"] + np.float32(constant)}
    moved = case._replace(params=case.params | {"router": router})
    y, aux = run(case.x, params=case.params)
    moved_y, moved_aux = run(case.x, params=moved.params)
    hypothesis.assume(moved.oracle().margin > cases.MARGIN)
    np.testing.assert_array_equal(np.sort(moved_aux.expert_ids), np.sort(aux.expert_ids))
    assert_close(moved_y, y, "float32")


@hypothesis.given(
    # XLA may flush subnormal numbers to zero.
    hnp.arrays(np.float32, 8, elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
    hnp.arrays(np.int32, 8, elements=st.integers(0, 1000)),
    st.sampled_from([0.0, 1e-3, 0.5]),
)
def test_bias_update(bias, counts, rate):
    updated = update_correction_bias(bias, counts, rate)
    assert updated.dtype == np.float32
    np.testing.assert_allclose(updated, oracle.update_correction_bias(bias, counts, rate), rtol=1e-6, atol=1e-6)
    assert (np.asarray(updated)[counts == counts.mean()] == bias[counts == counts.mean()]).all()
