"""The layer against the float64 oracle: outputs, routing, losses and all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import RouterConfig, init_params, latent_moe, presets
from jax_latent_moe.config import SCORE_FUNCTIONS
from tests import cases, seeds
from tests.cases import TOY
from tests.conformance.rows import every_row
from tests.layers import cast, check_against_oracle, run
from tests.parallel.meshes import WHOLE_MATRIX
from tests.tolerances import assert_close

NEMOTRON = dataclasses.replace(
    TOY, top_k=4, num_experts=16, hidden_size=32, latent_size=16, expert_intermediate_size=24,
    router=RouterConfig(routed_scaling_factor=2.5, switch_loss_coef=0.1),
)  # fmt: skip
KIMI = dataclasses.replace(NEMOTRON, activation="situ_glu", latent_norm="post")
MARIN = dataclasses.replace(
    NEMOTRON, activation="geglu", latent_norm="pre",
    router=RouterConfig(selection="logit", norm_topk_eps=1e-9, sequence_loss_coef=0.1, z_loss_coef=0.01),
)  # fmt: skip
QWEN = dataclasses.replace(
    NEMOTRON, latent_size=None, activation="swiglu", shared_expert_intermediate_size=0,
    router=RouterConfig(score_function="softmax", correction_bias=False, norm_topk_eps=0.0),
)  # fmt: skip
DEEPSEEK = dataclasses.replace(QWEN, router=RouterConfig(num_groups=4, topk_groups=2, routed_scaling_factor=2.5))
MIXTRAL = dataclasses.replace(
    QWEN, activation="gelu", router=RouterConfig(score_function="softmax_topk", correction_bias=False)
)
QWEN_NEXT = dataclasses.replace(QWEN, shared_expert_intermediate_size=7, shared_expert_gate=True)
FAMILIES = {
    "nemotron": NEMOTRON,
    "kimi": KIMI,
    "marin": MARIN,
    "qwen": QWEN,
    "qwen_next": QWEN_NEXT,
    "deepseek": DEEPSEEK,
    "mixtral": MIXTRAL,
}
every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)

NARROW = [(family, dtype) for family in FAMILIES for dtype in ("bfloat16", "float16")]
if not WHOLE_MATRIX:  # every family in one of the two, and each of the two in half of the families
    NARROW = [NARROW[2 * i + at % 2] for i, at in enumerate(seeds.generator("narrow").permutation(len(FAMILIES)))]

OPTIMISED = ("test_random_layers", "test_low_precision")


@pytest.fixture(autouse=True)
def hurried(request):
    """On a CPU the layers compile without costly optimisations, but for random ones and those of 16 bits."""
    if jax.default_backend() == "cpu" and request.function.__name__ not in OPTIMISED:
        request.getfixturevalue("compiled_in_a_hurry")


@pytest.mark.parametrize("index", range(24 if WHOLE_MATRIX else 16))
def test_random_layers(rng, index):
    check_against_oracle(cases.random_case(rng))


@pytest.mark.parametrize(("family", "dtype"), NARROW)
def test_low_precision(rng, family, dtype):
    config = dataclasses.replace(FAMILIES[family], dtype=dtype)
    check_against_oracle(cases.random_inputs(rng, config, (2, 16), masked=True))


@every_family
def test_float64(rng, config):
    router = dataclasses.replace(config.router, dtype="float64")
    config = dataclasses.replace(config, dtype="float64", router=router)
    with jax.enable_x64(True):
        check_against_oracle(cases.random_inputs(rng, config, (9,)))


@every_row
@pytest.mark.parametrize("config", [NEMOTRON, KIMI], ids=["plain", "gated"])
def test_every_backend(rng, row, config):
    sizes = {name: row.size(getattr(config, name)) for name in ("latent_size", "expert_intermediate_size")}
    config = dataclasses.replace(config, **sizes, backend=row.backend, dtype=row.dtype)
    check_against_oracle(cases.random_inputs(rng, config, (2, 7), masked=True, replay=True))


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_experts=16, top_k=12),
        dict(num_experts=5, top_k=5),
        dict(num_experts=1, top_k=1),
        dict(num_experts=33, top_k=2),
    ],
    ids=["k above 10", "k = E", "one expert", "more experts than rows"],
)
def test_unusual_numbers_of_experts(rng, changes):
    router = dataclasses.replace(TOY.router, norm_topk_prob=False)
    check_against_oracle(cases.random_inputs(rng, dataclasses.replace(TOY, router=router, **changes), (6,)))


def test_all_tokens_on_one_expert(rng):
    router = RouterConfig(norm_topk_prob=False)
    config = dataclasses.replace(TOY, top_k=1, router=router)
    for expert in range(config.num_experts):
        case = cases.random_inputs(rng, config, (6,))
        check_against_oracle(case._replace(expert_ids=np.full((6, 1), expert)))


def test_experts_without_tokens_have_zero_gradient(rng):
    case = cases.random_inputs(rng, TOY, (6,))
    ids = np.broadcast_to([1, 4, 6], (6, 3))
    _, dparams, _ = run(case._replace(expert_ids=ids))
    for name in ("w_in", "w_out"):
        used = np.abs(np.asarray(dparams["experts"][name])).reshape(TOY.num_experts, -1).max(axis=1) > 0
        np.testing.assert_array_equal(np.flatnonzero(used), [1, 4, 6])


def test_the_same_expert_twice_counts_twice(rng):
    """Replay takes any ids, such as a recording whose choices repeat."""
    case = cases.random_inputs(rng, TOY, (6,))
    check_against_oracle(case._replace(expert_ids=np.broadcast_to([2, 2, 5], (6, 3))))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (3, 0), (2, 1, 3, 2)])
def test_every_leading_shape(rng, leading):
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=RouterConfig(sequence_loss_coef=1.0)), leading)
    check_against_oracle(case)
    (_, aux), _, _ = run(case)
    assert aux.expert_ids.shape == (*leading, TOY.top_k)
    assert aux.weights.shape == (*leading, TOY.top_k)


def test_all_tokens_masked(rng):
    router = RouterConfig(switch_loss_coef=1.0, sequence_loss_coef=1.0, z_loss_coef=1.0)
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=router), (2, 3))
    check_against_oracle(case._replace(token_mask=np.zeros((2, 3), bool)))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_tokens_may_hold_anything(rng, poison):
    """Outputs, losses and gradients equal those with zeros in their place; no gradient reaches them."""
    router = RouterConfig(switch_loss_coef=0.1, sequence_loss_coef=0.1, z_loss_coef=0.1)
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=router, latent_norm="post"), (2, 6), masked=True)
    mask = case.token_mask.copy()
    mask[0, :2] = False
    x = case.x.copy()
    x[~mask] = poison
    dy = np.where(mask[..., None], case.dy, poison)
    case = case._replace(x=x, token_mask=mask, dy=dy)
    check_against_oracle(case)
    (y, aux), _, dx = run(case)
    assert not np.asarray(y)[~mask].any()
    assert (np.asarray(aux.expert_ids)[~mask] == -1).all()
    assert not np.asarray(aux.weights)[~mask].any()
    assert not np.asarray(dx)[~mask].any()


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
@pytest.mark.parametrize(("dtype", "huge"), [("float32", 1e30), ("bfloat16", 1e20), ("float16", 3e3)])
def test_masked_tokens_may_hold_huge_numbers(rng, function, dtype, huge):
    """Finite numbers whose products and squares are not: the results are bit for bit as with zeros in their place."""
    router = RouterConfig(score_function=function, switch_loss_coef=0.1, sequence_loss_coef=0.1, z_loss_coef=0.1)
    config = dataclasses.replace(TOY, router=router, latent_norm="pre", dtype=dtype)
    case = cases.random_inputs(rng, config, (2, 6), masked=True)
    mask = case.token_mask & (np.arange(6) != 2)
    padded, zeroed = (case._replace(x=np.where(mask[..., None], case.x, fill), token_mask=mask) for fill in (huge, 0.0))
    jax.tree.map(np.testing.assert_array_equal, run(padded), run(zeroed))
    if dtype == "float32":
        check_against_oracle(padded)


def test_sequences_of_padding_alone_do_not_count(rng):
    """The mean over sequences is over those with tokens: the loss is that of a batch without the others."""
    config = dataclasses.replace(TOY, router=RouterConfig(sequence_loss_coef=1.0))
    case = cases.random_inputs(rng, config, (4, 5), masked=True)
    mask = case.token_mask.copy()
    mask[:, 0], mask[2] = True, False
    check_against_oracle(case._replace(token_mask=mask))
    (_, padded), _, _ = run(case._replace(token_mask=mask))
    kept = [0, 1, 3]
    (_, aux), _, _ = run(case._replace(x=case.x[kept], dy=case.dy[kept], token_mask=mask[kept]))
    assert_close(padded.losses["sequence"], aux.losses["sequence"], "float32")


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16", "uint32"])
def test_ids_of_every_integer_type_replay_alike(rng, dtype):
    """Also where the type cannot hold the number of experts."""
    experts = 1 + min(int(np.iinfo(dtype).max), 299)
    config = dataclasses.replace(TOY, num_experts=experts, hidden_size=4, latent_size=None)
    case = cases.draw(rng, config, (6,), masked=rng.random() < 0.5)
    ids = rng.integers(experts - 3, experts, size=(6, 3))
    if np.iinfo(dtype).min < 0:
        ids[:2] = [[-1], [-2]]
    layer = jax.jit(latent_moe, static_argnums=2)
    arguments = cast(case.params, "float32"), np.float32(case.x), config
    narrow, wide = (
        layer(*arguments, token_mask=case.token_mask, expert_ids=ids.astype(kind)) for kind in (dtype, "int32")
    )
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    real = [t for t in range(2, 6) if case.token_mask is None or case.token_mask[t]]
    np.testing.assert_array_equal(narrow[1].expert_ids[np.array(real, int), :], ids[real, :])


@pytest.mark.parametrize("far", [2**32 + 3, -(2**32) + 3, 2**63 - 1, -(2**63)])
def test_ids_of_64_bits_do_not_wrap(rng, far):
    """Cut to 32 bits, they would be an expert."""
    with jax.enable_x64(True):
        ids = np.where(np.arange(3) == 1, far, [0, 5, 2]) * np.ones((6, 1), np.int64)
        case = cases.random_inputs(rng, TOY, (6,))
        (far_y, aux), *_ = run(case._replace(expert_ids=ids))
        (y, _), *_ = run(case._replace(expert_ids=np.where(ids == far, -1, ids)))
    np.testing.assert_array_equal(aux.expert_ids, np.broadcast_to([0, -1, 2], (6, 3)))
    np.testing.assert_array_equal(far_y, y)


def test_the_router_decides_for_tokens_that_ask_for_it(rng):
    router = RouterConfig(num_groups=4, topk_groups=2, per_expert_scale=True, switch_loss_coef=0.1)
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=router), (8,), replay=True)
    ids = case.expert_ids.copy()
    ids[[1, 4]] = -2
    ids[6, 2] = -2  # one is enough
    case = case._replace(expert_ids=ids)
    assert case.oracle().margin > 0
    check_against_oracle(case)
    (_, aux), *_ = run(case)
    (_, free), *_ = run(case._replace(expert_ids=None))
    own = [1, 4, 6]
    np.testing.assert_array_equal(aux.expert_ids[own, :], free.expert_ids[own, :])
    np.testing.assert_array_equal(np.delete(aux.expert_ids, own, 0), np.delete(ids, own, 0))


def test_masked_tokens_get_zeros(rng):
    case = cases.random_inputs(rng, TOY, (5,))
    (y, _), _, _ = run(case._replace(token_mask=np.zeros(5, bool)))
    assert not np.asarray(y).any()


@pytest.mark.parametrize("config", [NEMOTRON, KIMI, DEEPSEEK], ids=["nemotron", "kimi", "deepseek"])
def test_nan_token_poisons_its_own_row_alone(rng, config):
    case = cases.random_inputs(rng, config, (8,))
    (clean, _), _, _ = run(case)
    x = case.x.copy()
    x[3] = np.nan
    (y, _), _, _ = run(case._replace(x=x))
    assert np.isnan(np.asarray(y)[3]).all()
    np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(clean, 3, 0))


def test_replaying_its_own_ids_changes_nothing(rng):
    router = RouterConfig(num_groups=2, switch_loss_coef=0.1, capacity_factor=1.0)
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=router), (3, 5), masked=True)
    first = run(case)
    again = run(case._replace(expert_ids=np.asarray(first[0][1].expert_ids)))
    for value, ref in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        if jax.default_backend() == "gpu" and jnp.issubdtype(ref.dtype, jnp.floating):
            assert_close(np.asarray(value), np.asarray(ref), "float32")  # its two programs may round a sum apart
        else:
            np.testing.assert_array_equal(value, ref)


@pytest.mark.parametrize(("factor", "tokens", "k", "experts", "capacity"), [(1.1, 200, 2, 8, 55), (0.7, 30, 1, 3, 7)])
def test_capacity_is_counted_in_integers(rng, factor, tokens, k, experts, capacity):
    """1.1 * 50 and 0.7 * 10 are 55 and 7, and a float of either is a little more."""
    router = RouterConfig(capacity_factor=factor, norm_topk_prob=False)
    config = dataclasses.replace(TOY, top_k=k, num_experts=experts, router=router)
    case = cases.draw(rng, config, (tokens,))
    case.params["router"]["bias"][:k] += 8  # all tokens on the first k experts
    (_, aux), *_ = run(case)
    np.testing.assert_array_equal((aux.tokens_per_expert - aux.dropped_per_expert)[:k], capacity)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_bounds_every_expert(rng, policy):
    router = RouterConfig(capacity_factor=0.5, min_capacity=1, drop_policy=policy)
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=router), (4, 5))
    check_against_oracle(case)
    (_, aux), _, _ = run(case)
    capacity = -(-4 * 5 * TOY.top_k // (2 * TOY.num_experts))
    kept = np.asarray(aux.tokens_per_expert - aux.dropped_per_expert)
    assert kept.max() == capacity
    assert np.asarray(aux.tokens_per_expert).sum() == 4 * 5 * TOY.top_k


def test_no_capacity_drops_every_row(rng):
    router = RouterConfig(capacity_factor=0.0)
    case = cases.random_inputs(rng, dataclasses.replace(TOY, router=router), (6,))
    check_against_oracle(case)
    (_, aux), _, _ = run(case)
    np.testing.assert_array_equal(aux.dropped_per_expert, aux.tokens_per_expert)


def test_routed_scale_on_output_or_on_weights_is_one_function_without_post_norm(rng):
    case = cases.random_inputs(rng, NEMOTRON, (7,))
    on_output = case._replace(config=dataclasses.replace(NEMOTRON, apply_routed_scale_to_output=True))
    ((y, aux), *grads), ((y_output, aux_output), *grads_output) = run(case), run(on_output)
    assert_close(y_output, y, "float32")
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), grads_output, grads)
    assert_close(aux_output.weights * NEMOTRON.router.routed_scaling_factor, aux.weights, "float32")


def test_latent_layer_with_identity_projections_is_a_plain_one(rng):
    config = dataclasses.replace(TOY, latent_size=TOY.hidden_size)
    case = cases.random_inputs(rng, config, (6,))
    identity = {"kernel": np.eye(config.hidden_size)}
    latent = case._replace(params=case.params | {"down_proj": identity, "up_proj": identity})
    plain = {part: leaves for part, leaves in case.params.items() if not part.endswith("_proj")}
    (y, _), _, _ = run(latent)
    (y_plain, _), _, _ = run(case._replace(config=dataclasses.replace(config, latent_size=None), params=plain))
    assert_close(y, y_plain, "float32")


def test_x_of_another_dtype_is_computed_in_the_configured_one(rng):
    config = dataclasses.replace(NEMOTRON, dtype="bfloat16")
    case = cases.random_inputs(rng, config, (7,))
    params = cast(case.params, "float32")
    y, _ = latent_moe(params, jnp.asarray(case.x, jnp.float32), config)
    same, _ = latent_moe(params, jnp.asarray(case.x, jnp.bfloat16), config)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, same)


def test_numpy_arrays_without_jit(rng):
    config = QWEN
    case = cases.random_inputs(rng, config, (4,))
    params = {part: {n: np.float32(p) for n, p in leaves.items()} for part, leaves in case.params.items()}
    y, pullback = jax.vjp(lambda x: latent_moe(params, x, config)[0], np.float32(case.x))
    assert_close(y, case.oracle().y, "float32")
    assert np.isfinite(pullback(np.ones(y.shape, np.float32))[0]).all()


def test_correction_bias_changes_the_choice_and_never_the_weights(rng):
    router = dataclasses.replace(NEMOTRON.router, norm_topk_prob=False)
    case = cases.random_inputs(rng, dataclasses.replace(NEMOTRON, router=router), (7,))
    bias = np.where(np.arange(16) < 4, 100.0, 0.0)
    case = case._replace(params=case.params | {"router": case.params["router"] | {"bias": bias}})
    (_, aux), dparams, _ = run(case)
    assert set(np.unique(aux.expert_ids)) == {0, 1, 2, 3}
    scores = 1 / (1 + np.exp(-case.x @ case.params["router"]["kernel"]))
    expected = 2.5 * np.take_along_axis(scores, np.asarray(aux.expert_ids), axis=-1)
    assert_close(aux.weights, expected, "float32")
    assert not np.asarray(dparams["router"]["bias"]).any()


def test_two_runs_give_equal_bits(rng):
    case = cases.random_inputs(rng, KIMI, (3, 5), masked=True)
    first, again = run(case), run(case)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), first, again)


def test_initial_layer_of_the_toy_preset_matches_the_oracle(rng):
    """Parameters from `init_params`, not from this suite."""
    config = dataclasses.replace(presets.TOY, dtype="float32")
    params = jax.tree.map(np.float64, init_params(jax.random.key(int(rng.integers(2**31))), config))
    drawn = cases.random_inputs(rng, config, (2, 8))
    case = drawn._replace(params=params)
    while not case.is_comparable(rng):
        case = cases.draw(rng, config, (2, 8))._replace(params=params)
    check_against_oracle(case)
