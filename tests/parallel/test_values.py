"""The layer on every mesh of up to 8 devices gives what the oracle gives: outputs, routing, losses, gradients."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jax_latent_moe import RouterConfig, latent_moe, update_correction_bias
from tests import cases, layers, oracle, seeds
from tests.cases import with_router
from tests.parallel.meshes import BASE, SIZES, WHOLE_MATRIX, make_mesh
from tests.tolerances import assert_close, assert_trees_close

LOSSES = RouterConfig(switch_loss_coef=0.3, sequence_loss_coef=0.2, z_loss_coef=0.1)
STRATEGIES = ("all_gather", "all_to_all")
NORMS = ("none", "pre", "post")
DRAWN = 8


def with_dispatch(config, dispatch, capacity_factor=None):
    parallel = dataclasses.replace(config.parallel, dispatch=dispatch, capacity_factor=capacity_factor)
    return dataclasses.replace(config, parallel=parallel)


def drawn_config(rng, dispatch, norm):
    """Losses always; shared expert, gate, latent, capacity and where weights apply as they fall."""
    activation, shared, latent = rng.choice(["relu2", "swiglu"]).item(), rng.choice([0, 8]).item(), rng.choice([4, 8])
    config = dataclasses.replace(
        with_dispatch(BASE, dispatch, rng.choice([None, 100.0])),
        activation=activation,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=shared > 0 and rng.random() < 0.5,
        latent_size=int(latent) * 2,
        latent_norm=norm,
        latent_norm_eps=1e-2 if norm != "none" else 1e-5,
        apply_routed_scale_to_output=rng.random() < 0.5,
        router=dataclasses.replace(LOSSES, routed_scaling_factor=2.5),
    )
    return with_router(config, capacity_factor=1.25) if rng.random() < 0.3 else config


def drawn_case(rng, config):
    """Inputs of which a part is masked or replayed, and loads that leave some devices without a row."""
    leading = [(8, 3), (8,), (16, 1, 2)][rng.integers(3)]
    case = cases.random_inputs(rng, config, leading, masked=rng.random() < 0.5, replay=rng.random() < 0.3)
    if config.router.correction_bias and case.expert_ids is None and rng.random() < 0.5:
        case.params["router"]["bias"][:3] += 8  # every token goes to the first three experts
    return case


MATRIX = list(itertools.product(SIZES, STRATEGIES, NORMS))
if not WHOLE_MATRIX:  # every worker of xdist draws the same
    MATRIX = [MATRIX[i] for i in sorted(seeds.generator("meshes").choice(len(MATRIX), DRAWN, replace=False))]


@pytest.mark.parametrize(("sizes", "strategy", "norm"), MATRIX, ids=str)
def test_any_mesh(rng, sizes, strategy, norm):
    case = drawn_case(rng, drawn_config(rng, strategy, norm))
    with jax.set_mesh(make_mesh(*sizes)):
        layers.check_against_oracle(case)


@pytest.mark.parametrize("norm", ["none", "post"])
def test_a_gated_shared_expert_in_parts(rng, norm):
    config = dataclasses.replace(drawn_config(rng, "all_gather", norm), shared_expert_intermediate_size=8)
    config = dataclasses.replace(config, shared_expert_gate=True)
    with jax.set_mesh(make_mesh(1, 2, 2, 2)):
        layers.check_against_oracle(drawn_case(rng, config))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_moe_without_latent(rng, strategy):
    config = with_router(with_dispatch(BASE, strategy), norm_topk_prob=False)
    config = dataclasses.replace(config, latent_size=None, top_k=1, apply_probs_on_input=True)
    with jax.set_mesh(make_mesh(1, 2, 2, 2)):
        layers.check_against_oracle(cases.random_inputs(rng, config, (4, 3)))


def test_equals_one_device(rng):
    """Outputs, gradients, losses and bias updates against the same function without a mesh."""
    config = dataclasses.replace(BASE, router=LOSSES, latent_norm="post")
    case = cases.random_inputs(rng, config, (8, 3), masked=True)
    (y, aux), dparams, dx = layers.run(case)
    with jax.set_mesh(make_mesh(2, 1, 2, 2)):
        (y_mesh, aux_mesh), dparams_mesh, dx_mesh = layers.run(case)
    assert_close(y_mesh, y, "float32")
    assert_close(dx_mesh, dx, "float32")
    assert_trees_close(dparams_mesh, dparams, "float32")
    assert_trees_close(aux_mesh.losses, aux.losses, "float32")
    np.testing.assert_array_equal(aux_mesh.expert_ids, aux.expert_ids)
    np.testing.assert_array_equal(aux_mesh.tokens_per_expert, aux.tokens_per_expert)
    bias = case.params["router"]["bias"].astype(np.float32)
    np.testing.assert_array_equal(
        update_correction_bias(bias, aux_mesh.tokens_per_expert, 1e-3),
        update_correction_bias(bias, aux.tokens_per_expert, 1e-3),
    )


def test_no_token_at_all(rng):
    """Every token masked: nothing travels, nothing counts, no gradient reaches an expert."""
    case = cases.draw(rng, dataclasses.replace(BASE, router=LOSSES), (8, 2))
    case = case._replace(token_mask=np.zeros((8, 2), bool))
    with jax.set_mesh(make_mesh(1, 1, 4, 2)):
        layers.check_against_oracle(case)
        _, dparams, _ = layers.run(case)
    assert not any(np.any(leaf) for leaf in dparams["experts"].values())


def without_overflow(case, devices):
    """The case with the choices taken out that the dispatch drops, and their number for each expert.

    x is [devices, tokens, d]. The largest weights between each pair of devices stay.
    """
    config, tokens = case.config, case.x.shape[1]
    capacity = -(-int(np.ceil(config.parallel.capacity_factor * tokens * config.top_k / devices)) // 8) * 8
    whole = case.oracle()
    ids, holder = np.array(whole.expert_ids), np.array(whole.expert_ids) * devices // config.num_experts
    for sender, receiver in itertools.product(range(devices), repeat=2):
        chosen = np.argwhere(holder[sender] == receiver)
        order = np.argsort([-whole.weights[sender][tuple(at)] for at in chosen], kind="stable")
        for at in chosen[order[capacity:]]:
            ids[sender][tuple(at)] = -1
    dropped = np.bincount(np.array(whole.expert_ids)[ids < 0], minlength=config.num_experts)
    assert dropped.sum(), "nothing overflowed: the test needs a smaller factor"
    return case._replace(expert_ids=ids), dropped


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_overflow_is_counted_and_leaves_the_rest_as_it_is(rng, strategy):
    """Against the oracle with the dropped choices taken out."""
    config = with_router(with_dispatch(BASE, strategy, 0.5), norm_topk_prob=False)
    case = cases.draw(rng, config, (4, 16))
    kept, dropped = without_overflow(case, 4)
    wanted = kept.oracle()
    dparams_wanted, dx_wanted = oracle.backward(case.params, config, wanted, case.dy)
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        (y, aux), dparams, dx = layers.run(case)
    np.testing.assert_array_equal(aux.dropped_per_expert, dropped)
    np.testing.assert_array_equal(aux.tokens_per_expert, case.oracle().tokens_per_expert)
    assert_close(y, wanted.y, "float32")
    assert_trees_close(dparams["experts"], dparams_wanted["experts"], "float32")
    assert_close(dx, dx_wanted, "float32")


def test_bfloat16(rng):
    """Sums of parts round more often than one sum does: within twice the table's tolerance of the oracle."""
    case = cases.random_inputs(rng, dataclasses.replace(BASE, dtype="bfloat16"), (8, 4))
    with jax.set_mesh(make_mesh(1, 2, 2, 2)):
        (y, _), *_ = layers.run(case)
    assert y.dtype == "bfloat16"
    exact = case.oracle().y
    assert np.linalg.norm(np.float64(y) - exact) <= 2 * 4 * 2.0**-8 * np.linalg.norm(exact)


def test_two_runs_give_the_same_bits(rng):
    case = cases.draw(rng, with_dispatch(BASE, "all_to_all"), (8, 4))
    with jax.set_mesh(make_mesh(1, 1, 8, 1)):
        first, second = layers.run(case), layers.run(case)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_axes_that_the_mesh_lacks_have_size_one(rng):
    case = cases.random_inputs(rng, BASE, (4, 2))
    with jax.set_mesh(make_mesh(2, 2, names=("expert", "pipeline"))):
        layers.check_against_oracle(case)


@pytest.mark.parametrize("sizes", [(), (1, 1, 1, 1)])
def test_one_device_has_no_collective(rng, sizes):
    case = cases.draw(rng, BASE, (2, 3))
    context = (
        jax.set_mesh(make_mesh(*sizes)) if sizes else jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[0]), ()))
    )
    with context:
        text = str(jax.make_jaxpr(lambda x: latent_moe(layers.cast(case.params, "float32"), x, BASE))(case.x))
    assert not any(name in text for name in ("shard_map", "psum", "all_gather", "all_to_all"))
