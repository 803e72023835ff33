"""Tokens rounded to tiles: the choice by a loop, outputs by the oracle's parts, gradients by finite differences."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, LatentMoEConfig, RouterConfig, latent_moe
from tests import cases, layers
from tests import drawn as grids
from tests.oracle.layer import token_forward
from tests.oracle.router import best, choose, scores, weigh
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

WIDE = LatentMoEConfig(
    hidden_size=6,
    latent_size=4,
    num_experts=16,
    top_k=9,
    expert_intermediate_size=3,
    shared_expert_intermediate_size=2,
    dtype="float64",
    router=RouterConfig(dtype="float64", round_to_tile=4),
)


def next_choices(config, logits, ids, bias):
    """The best min(k, E - k) experts that a token did not choose."""
    by_logit = config.router.selection != "score" or config.router.score_function == "softmax_topk"
    c = (logits if by_logit else scores(config.router.score_function, logits)) + bias
    c = np.where(np.isin(np.arange(len(c)), ids), -np.inf, c)
    return best(c, min(config.top_k, config.num_experts - config.top_k))


def added_weight(config, logits, ids, expert, scale):
    """The score over the sum of the token's own scores and this one."""
    router, own = config.router, ids[ids >= 0]
    p = np.exp(logits) if router.score_function == "softmax_topk" else scores(router.score_function, logits)
    weight = p[expert]
    eps = router.norm_topk_eps if router.norm_topk_prob else 0.0
    if router.score_function == "softmax_topk":  # these scores sum to one, before the epsilon is added
        weight = weight / (p[own].sum() + weight) / (1 + eps)
    elif router.norm_topk_prob:
        weight = weight / (p[own].sum() + weight + eps)
    factor = 1.0 if config.apply_routed_scale_to_output else router.routed_scaling_factor
    return weight * factor * scale[expert]


def rounded_layer(params, x, config, token_mask=None, frozen=None):
    """Y [T, d], the assignments of each token {expert: own?}, and own choices that were dropped [E], by plain loops.

    `frozen` gives the assignments, so that finite differences do not change them.
    """
    tile, k, experts = config.router.round_to_tile, config.top_k, config.num_experts
    mask = np.ones(len(x), bool) if token_mask is None else token_mask
    x = np.where(mask[:, None], x, 0)
    logits = x @ params["router"]["kernel"]
    bias = params["router"].get("bias", np.zeros(experts))
    scale = params["router"].get("scale", np.ones(experts))
    ids = np.full((len(x), k), -1)
    for t in np.flatnonzero(mask):
        ids[t] = choose(config, logits[t], bias)[0] if frozen is None else frozen[0][t]
    weights = np.stack([weigh(config, logits[t], ids[t], scale)[0] for t in range(len(x))])
    extra = {}
    for t in np.flatnonzero(mask):
        more = next_choices(config, logits[t], ids[t], bias) if frozen is None else frozen[1].get(t, ())
        extra[t] = {e: added_weight(config, logits[t], ids[t], e, scale) for e in more}
    kept = {t: {} for t in range(len(x))}
    dropped = np.zeros(experts, int)
    for e in range(experts):
        own = sorted((-weights[t, j], t) for t, j in np.argwhere(ids == e))
        others = sorted((-added[e], t) for t, added in extra.items() if e in added)
        wanted = (2 * len(own) + tile) // (2 * tile) * tile
        if wanted > len(own) + len(others):
            wanted = len(own) // tile * tile
        if frozen is not None:
            chosen = [t for t in kept if e in frozen[2][t]]
            for t in chosen:
                kept[t][e] = weights[t, list(ids[t]).index(e)] if e in ids[t] else extra[t][e]
            continue
        for negative, t in (own + others)[:wanted]:
            kept[t][e] = -negative
        dropped[e] = max(len(own) - wanted, 0)
    y = np.stack(
        [
            token_forward(
                params, x[t], config, np.array([*kept[t]], int), np.array([*kept[t].values()]), np.ones(len(kept[t]))
            )[0]
            for t in range(len(x))
        ]
    )
    return y * mask[:, None], (ids, extra, kept), dropped


def drawn(rng, config, tokens, masked=False):
    case = cases.draw(rng, config, (tokens,), masked)
    return case, rounded_layer(case.params, case.x, config, case.token_mask)


def drawn_with_both(rng, config, tokens):
    """A masked case in which some experts drop choices of their own and some take others' tokens."""
    for _ in range(20):
        case, layer = drawn(rng, config, tokens, masked=True)
        _, (own, _, kept), dropped = layer
        if dropped.any() and any(e not in own[t] for t, experts in kept.items() for e in experts):
            return case, layer
    raise AssertionError("20 draws, and none has both.")


ROUTERS = {
    "sigmoid": dict(routed_scaling_factor=2.5),
    "softmax": dict(score_function="softmax", correction_bias=False, per_expert_scale=True),
    "no epsilon": dict(score_function="softmax", correction_bias=False, norm_topk_eps=0.0),
    "softmax of the chosen": dict(score_function="softmax_topk", norm_topk_prob=False, correction_bias=False),
    "normalised with an epsilon": dict(score_function="softmax_topk", norm_topk_eps=0.25),
    "not normalised": dict(score_function="sqrt_softplus", norm_topk_prob=False),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_values_and_gradients(rng, router):
    """In float64: every gradient against central differences of the loop, in two random directions."""
    config = cases.with_router(WIDE, **router)
    case, (wanted, choices, dropped) = drawn_with_both(rng, config, 21)
    loads = np.bincount([e for kept in choices[2].values() for e in kept], minlength=16)
    assert (loads % 4 == 0).all()
    with jax.enable_x64(True):
        (y, aux), dparams, dx = layers.run(case)
    assert_close(y, wanted, "float64")
    np.testing.assert_array_equal(aux.dropped_per_expert, dropped)
    np.testing.assert_array_equal(np.sort(aux.expert_ids), np.sort(choices[0]))
    for _ in range(2):
        along = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), case.params)
        if "bias" in along["router"]:
            along["router"]["bias"][:] = 0
        along_x = rng.normal(size=case.x.shape)

        def at(step, along=along, along_x=along_x):
            moved = jax.tree.map(lambda leaf, change: leaf + step * change, case.params, along)
            y = rounded_layer(moved, case.x + step * along_x, config, case.token_mask, choices)[0]
            return np.sum(y * case.dy)

        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        found = sum(jax.tree.leaves(jax.tree.map(lambda g, a: np.sum(np.asarray(g) * a), dparams, along)))
        assert found + np.sum(np.asarray(dx) * along_x) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_tiles(rng, tile):
    """A tile of 1 changes nothing; one that is more than twice every load drops all choices."""
    config = dataclasses.replace(cases.with_router(WIDE, dtype="float32", round_to_tile=tile), dtype="float32")
    case, (wanted, choices, dropped) = drawn(rng, config, 25)
    (y, aux), dparams, _ = layers.run(case)
    assert_close(y, wanted, "float32")
    np.testing.assert_array_equal(aux.dropped_per_expert, dropped)
    if tile == 1:
        assert_close(y, cases.Case(cases.with_router(config, round_to_tile=None), *case[1:]).oracle().y, "float32")
    if tile == 64:
        assert (dropped == np.bincount(choices[0].reshape(-1), minlength=16)).all()
        assert not np.asarray(dparams["experts"]["w_in"]).any()


MESHES = itertools.product([(2, 1, 4, 1), (1, 2, 2, 2)], ["all_gather", "all_to_all"])


@pytest.mark.parametrize(("sizes", "dispatch"), grids.drawn(MESHES, 2), ids=str)
def test_a_mesh_rounds_over_all_tokens(rng, sizes, dispatch):
    parallel = dataclasses.replace(BASE.parallel, dispatch=dispatch)
    config = cases.with_router(dataclasses.replace(BASE, parallel=parallel, top_k=5), round_to_tile=8)
    case, (wanted, _, dropped) = drawn(rng, config, 24)
    with jax.set_mesh(make_mesh(*sizes)):
        y, aux = jax.jit(latent_moe, static_argnums=2)(layers.cast(case.params, "float32"), np.float32(case.x), config)
    assert_close(y, wanted, "float32")
    np.testing.assert_array_equal(aux.dropped_per_expert, dropped)


def test_rows_are_not_doubled():
    """Twice the choices are candidates; the experts' products have rows for what may be computed."""
    config = cases.with_router(dataclasses.replace(WIDE, dtype="float32"), dtype="float32")
    params = layers.cast(cases.random_params(np.random.default_rng(0), config), "float32")
    text = str(jax.make_jaxpr(latent_moe, static_argnums=2)(params, jnp.zeros((100, 6)), config))
    rows = 100 * 9 + 16 * 2
    assert f"f32[{rows + 8 - rows % 8},4]" in text
    assert "f32[1600,4]" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(round_to_tile=0), "router.round_to_tile=0 must be an integer of at least 1"),
        (dict(round_to_tile=8, capacity_factor=1.0), "both limit an expert's tokens: set one to None"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**fields)


def test_one_weight_before_the_experts_is_refused():
    router = RouterConfig(round_to_tile=8, norm_topk_prob=False)
    with pytest.raises(ConfigError, match=r"router.round_to_tile=8 may give it two experts"):
        dataclasses.replace(WIDE, top_k=1, apply_probs_on_input=True, router=router)
