"""The arms of the study: equal cost by two counts, equal data, and a factor on the latent."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.study.arms import ARMS, arm_named, model_of
from examples.study.definition import FAMILIES, STUDIES, Run, chosen_rates, config_of, queue, sweep_of
from examples.study.latent_scale import FIELD, make_latent_rms
from examples.train.config_file import to_json
from examples.train.data import ValidationWindows, train_batches
from examples.train.errors import TrainError
from examples.train.flops import flops_per_token
from examples.train.initialising import shapes
from examples.train.mlp import dense_width, moe_config
from examples.train.model import language_model
from examples.train.run_folder import flat
from examples.train.step import TrainState
from examples.train.text import Text
from jax_latent_moe import LatentMoEConfig, RouterConfig, init_params, latent_moe

D512, TOY = STUDIES["d512"], STUDIES["toy"]


def sizes(config):
    """Experts, top_k, latent width, inner width and shared width of the layer that the trainer builds."""
    moe = moe_config(config)
    width = moe.hidden_size if moe.latent_size is None else moe.latent_size
    return moe.num_experts, moe.top_k, width, moe.expert_intermediate_size, moe.shared_expert_intermediate_size


def counted_by_hand(config) -> float:
    """Operations of a token in training: 6 for each weight that it meets, and attention to half the context."""
    d, context, layers = config.model.hidden_size, config.model.context, config.model.layers
    first = 2 * d * dense_width(config.model)
    mlp = first
    if config.mlp != "dense":
        experts, top_k, latent, inner, shared = sizes(config)
        projections = 0 if config.mlp == "moe" else 2 * d * latent
        mlp = d * experts + projections + top_k * 2 * latent * inner + 2 * d * shared
    weights = layers * 4 * d * d + first + (layers - 1) * mlp + 256 * d
    attention = layers * 2 * (context / 2) * d  # scores and values: a multiply and an add for each pair and feature
    return 6 * (weights + attention)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_all_arms_cost_the_same(study):
    configs = [config_of(study, Run(arm.name, 1e-3, 1)) for arm in study.arms]
    counts = [flops_per_token(language_model(config)) for config in configs]
    np.testing.assert_allclose([counted_by_hand(config) for config in configs], counts, rtol=1e-12)
    assert max(counts) <= 1.01 * min(counts)
    assert len({dense_width(config.model) for config in configs}) == 1, "the first block is the same"


def test_a_run_at_512_takes_what_the_study_promises():
    config = config_of(D512, Run("moe", 1e-3, 1))
    tokens = config.steps * config.batch_size * config.model.context
    assert tokens * counted_by_hand(config) == pytest.approx(5e16, rel=0.01)
    assert tokens < 440_598_545 - 256 * 1024, "no run sees a byte twice"


@pytest.mark.parametrize("name", ["d512", "d768"])
def test_a_short_study_is_a_quarter_of_the_long_one(name):
    short = STUDIES[f"{name}-short"]
    assert short.blocks == STUDIES[name].blocks
    for run in (Run("moe", 1e-3, 1), Run("half-pre", 2e-3, 2)):
        long, found = config_of(STUDIES[name], run), config_of(short, run)
        assert found.steps == long.steps // 4
        assert (
            dataclasses.replace(
                found, steps=long.steps, eval_every=long.eval_every, checkpoint_every=long.checkpoint_every
            )
            == long
        )


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("moe", (64, 4, 512, 256, 1024)),
        ("half", (64, 4, 256, 512, 768)),
        ("half-x4", (64, 4, 256, 512, 768)),
        ("efficient-2", (128, 4, 256, 256, 1248)),
        ("efficient-4", (256, 4, 128, 256, 1568)),
        ("accurate-2", (128, 8, 256, 256, 736)),
        ("accurate-4", (256, 16, 128, 256, 800)),
        ("accurate-8", (512, 32, 64, 256, 736)),
    ],
)
def test_sizes_of_an_arm(arm, expected):
    assert sizes(config_of(D512, Run(arm, 1e-3, 1))) == expected


def test_arms_differ_in_the_feed_forward_and_the_learning_rate_alone():
    allowed = {"mlp", "switch_loss_coef", "bias_update", "bias_update_rate", "optimizer.learning_rate"}
    allowed |= {f"model.{name}" for name in ("latent_size", "num_experts", "top_k", "expert_intermediate_size")}
    allowed |= {f"model.{name}" for name in ("shared_expert_intermediate_size", "latent_norm", "routed_scaling_factor")}
    options = [flat(json.loads(to_json(config_of(D512, Run(arm.name, 1e-3, 1))))) for arm in D512.arms]
    differing = {name for name in options[0] if len({str(of_arm[name]) for of_arm in options}) > 1}
    assert differing <= allowed
    assert len({str(of_arm) for of_arm in options}) == len(ARMS), "no two arms are the same"


def test_the_same_seed_gives_every_arm_the_same_data():
    text = Text(np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8))

    def drawn(arm, seed):
        config = config_of(TOY, Run(arm.name, 1e-3, seed))
        batches = train_batches(text, config.model.context, config.batch_size, config.seed)
        return np.stack([batches.at(step).tokens for step in (0, 1, 7)])

    first = drawn(TOY.arms[0], 1)
    for arm in TOY.arms[1:]:
        np.testing.assert_array_equal(drawn(arm, 1), first)
    assert (drawn(TOY.arms[0], 2) != first).any()


def test_a_factor_on_the_latent_is_its_square_on_the_routed_output(rng):
    """Written out: the kernel that makes the latent is multiplied by the factor."""
    base = LatentMoEConfig(12, 6, 8, 3, 10, 5, activation="relu2", dtype="float32")
    params = init_params(jax.random.key(0), base)
    scaled = params | {"down_proj": {"kernel": 4 * params["down_proj"]["kernel"]}}
    moe = moe_config(config_of(D512, Run("half-x4", 1e-3, 1)))
    assert moe.activation == "relu2"
    assert moe.latent_norm == "none"
    by_weights = dataclasses.replace(base, router=RouterConfig(routed_scaling_factor=moe.router.routed_scaling_factor))
    x = jnp.float32(rng.normal(size=(7, 12)))
    layer = jax.jit(lambda params, x, config: latent_moe(params, x, config)[0], static_argnums=2)
    found, expected, plain = layer(params, x, by_weights), layer(scaled, x, base), layer(params, x, base)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - plain).max() > 0.1


def test_the_scale_of_the_latents(rng):
    """After a norm it is the learned scale; without one it follows the kernel."""
    tokens = rng.integers(0, 256, (4, 16)).astype(np.uint8)
    windows = ValidationWindows(tokens, tokens, np.ones_like(tokens, bool))
    found = {}
    for arm in ("half-pre", "half", "dense"):
        base = config_of(TOY, Run(arm, 1e-3, 1))
        config = dataclasses.replace(base, model=dataclasses.replace(base.model, context=16))
        model = language_model(config)
        shaped = shapes(model)
        params, biases = (
            jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), nn.unbox(shaped.get(name, {})))
            for name in ("params", "correction_bias")
        )
        state = TrainState(*np.zeros(6))._replace(params=params, correction_bias=biases)
        if arm == "dense":
            assert make_latent_rms(model, windows)(state) == {}
            continue
        layer = params["block_01"]["mlp"]
        if arm == "half-pre":
            layer["latent_norm"]["scale"] = np.ones(16, np.float32)
        part, leaf = ("latent_norm", "scale") if arm == "half-pre" else ("down_proj", "kernel")
        before = make_latent_rms(model, windows)(state)[FIELD]
        layer[part][leaf] = 3 * layer[part][leaf]
        found[arm] = before, make_latent_rms(model, windows)(state)[FIELD]
    assert found["half-pre"] == (pytest.approx([1.0], rel=1e-3), pytest.approx([3.0], rel=1e-3))
    assert found["half"][1] == pytest.approx([3 * value for value in found["half"][0]], rel=1e-4)


def test_the_sweep_chooses_the_best_rate_of_each_family():
    bits: dict[Run, float | None] = {run: run.learning_rate for run in sweep_of(TOY)}
    low, high = TOY.rates
    bits[Run(FAMILIES["moe"], low, 0)] = None  # it diverged
    assert chosen_rates(TOY, bits) == {"dense": low, "moe": high, "latent": low}
    runs = queue(TOY, bits)
    assert len(runs) == len(set(runs)) == 3 * 2 + 5 * 2
    assert {run.learning_rate for run in runs[6:] if run.arm == "half-pre"} == {low}
    assert queue(TOY, {}) == sweep_of(TOY), "the arms wait for the sweep"
    with pytest.raises(TrainError, match="All runs of dense in the sweep diverged"):
        chosen_rates(TOY, dict.fromkeys(sweep_of(TOY)))


def test_unknown_arms_and_sizes_that_do_not_divide():
    with pytest.raises(TrainError, match=r"There is no arm 'sparse': use some of dense, moe, .*quantile\."):
        arm_named("sparse")
    odd = dataclasses.replace(D512.base.model, hidden_size=48, expert_intermediate_size=7)
    with pytest.raises(TrainError, match=r"accurate-2 at hidden size 48 would need a shared expert"):
        model_of(arm_named("accurate-2"), dataclasses.replace(odd, num_experts=63))
