"""The model, its three feed-forwards and its optimiser."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from examples.train.attention import attend, rotary_table, rotate
from examples.train.config import Config, ModelConfig, OptimizerConfig
from examples.train.errors import TrainError
from examples.train.mlp import dense_width, moe_config
from examples.train.model import LanguageModel
from examples.train.optimizer import (
    clip_by_global_norm,
    global_norm,
    learning_rate,
    make_optimizer,
    muon_dimensions,
)
from examples.train.placing import make_mesh
from examples.train.presets import PRESETS, TOY
from examples.train.step import init_state_on, predict
from jax_latent_moe import cost
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def toy():
    model = LanguageModel(TOY.model, moe_config(TOY))
    optimizer = make_optimizer(TOY.optimizer, TOY.steps)
    return model, init_state_on(model, optimizer, 0, make_mesh("", TOY.batch_size))


@functools.cache
def logits_of(model):
    return jax.jit(lambda state, tokens: predict(model, state, tokens))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_feed_forwards_have_equal_active_flops(preset):
    config = PRESETS[preset]
    latent, plain = (moe_config(dataclasses.replace(config, mlp=mlp)) for mlp in ("latent_moe", "moe"))
    flops = cost.matmul_flops_per_token(latent)
    assert cost.matmul_flops_per_token(plain) == flops
    assert 2 * (2 * config.model.hidden_size * dense_width(config.model)) == flops


def test_moe_of_half_an_expert_is_refused():
    model = dataclasses.replace(TOY.model, top_k=1)
    with pytest.raises(
        TrainError, match=r"num_experts=8 and model\.top_k=1 by .* = 16/32: choose sizes that stay whole"
    ):
        moe_config(dataclasses.replace(TOY, model=model, mlp="moe"))


def test_attention_is_causal_softmax_attention(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 150, 2, 8)), jnp.float32) for _ in range(3))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert_close(jax.jit(attend, static_argnums=3)(q, k, v, "blocks"), expected, "float32")


@pytest.mark.parametrize("largest", [1.0, 1e3])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_clipping_is_that_of_the_norm_of_all_values(rng, monkeypatch, platform, largest):
    """By the sums of either platform."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    leaves = [rng.normal(size=shape).astype(np.float32) for shape in [(3, 5, 2), (7,), (3, 5, 2), (), (7,), (4, 0)]]
    norm = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in leaves))
    assert 1 < norm < 1e3, "only one of the cases clips"
    tree = {f"block_{i}": {"norm": {"scale": leaf}} for i, leaf in enumerate(leaves)}
    assert_close(jax.jit(global_norm)(tree), norm, "float32")
    assert_close(jax.jit(global_norm)(leaves), norm, "float32")
    clip = clip_by_global_norm(largest)
    clipped, _ = jax.jit(clip.update)(tree, clip.init(tree))
    for leaf, found in zip(leaves, jax.tree.leaves(clipped), strict=True):
        assert_close(found, leaf * min(1, largest / norm), "float32")


def test_the_norm_of_bfloat16_is_summed_in_float32():
    assert float(global_norm([jnp.ones((100, 1000), jnp.bfloat16)] * 2)) == pytest.approx(200_000**0.5, rel=1e-6)
    assert float(global_norm({})) == 0


def test_rotary_scores_depend_on_distance_alone(rng):
    q, k = (jnp.broadcast_to(jnp.asarray(rng.normal(size=8), jnp.float32), (1, 20, 1, 8)) for _ in range(2))
    table = rotary_table(jnp.arange(20), 8, "float32")
    scores = jnp.einsum("bqhw,bkhw->qk", rotate(q, table), rotate(k, table))
    for distance in range(5):
        np.testing.assert_allclose(jnp.diagonal(scores, -distance), scores[distance, 0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores[1, 0], scores[5, 0])


def test_model_reads_no_byte_ahead(toy, rng):
    model, state = toy
    tokens = rng.integers(0, 256, (1, TOY.model.context))
    changed = tokens.copy()
    changed[0, 20:] = rng.integers(0, 256, TOY.model.context - 20)
    before, after = logits_of(model)(state, jnp.concatenate([tokens, changed]))
    assert_close(after[:20], before[:20], "float32")
    assert not np.allclose(after[20:], before[20:])


def test_first_block_is_dense_and_bias_is_not_trained(toy):
    _, state = toy
    assert set(state.params["block_00"]["mlp"]) == {"w_in", "w_out"}
    assert set(state.params["block_01"]["mlp"]) >= {"router", "down_proj", "up_proj", "experts", "shared"}
    trained = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert not any("bias" in name for name in trained)
    assert set(state.correction_bias) == {"block_01"}


def test_muon_orthogonalises_each_expert_for_itself(toy):
    _, state = toy
    block = state.params["block_01"]
    params = {"experts": block["mlp"]["experts"], "qkv": block["attention"]["qkv"]}
    optimizer = make_optimizer(OptimizerConfig(name="muon", warmup_steps=0, weight_decay=0.0, clip=1e9), 10)
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    experts, qkv = updates["experts"], updates["qkv"]["kernel"]
    matrices = [*experts["w_in"], *experts["w_out"], *np.moveaxis(qkv.reshape(qkv.shape[0], 3, -1), 1, 0)]
    for matrix in matrices:
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        # Five steps of the quintic iteration bring every singular value near one common value, not onto it.
        assert values.max() < 2 * np.median(values)
        assert values.min() > 0.3 * np.median(values)


def test_muon_leaves_embedding_head_router_and_scales_to_adamw(toy):
    _, state = toy
    dimensions = jax.tree_util.tree_leaves_with_path(
        muon_dimensions(state.params), is_leaf=lambda leaf: leaf is None or isinstance(leaf, MuonDimensionNumbers)
    )
    left = {path[-2].key for path, value in dimensions if value is None}
    assert left >= {"embed", "head", "router", "norm", "mlp_norm"}
    assert not left & {"qkv", "out", "experts", "down_proj", "up_proj", "shared", "w_in", "w_out"}


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    schedule = learning_rate(config, 100)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 100)], [0, 0.5, 1, 0.1], rtol=1e-6)
    assert schedule(40) > schedule(60)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (Config, {"steps": 0}, r"steps=0 must be at least 1"),
        (Config, {"batch_size": -1}, r"batch_size=-1 must be at least 1"),
        (OptimizerConfig, {"learning_rate": float("nan")}, r"optimizer\.learning_rate=nan must be more than 0"),
        (OptimizerConfig, {"warmup_steps": -1}, r"optimizer\.warmup_steps=-1 must be at least 0"),
        (ModelConfig, {"dropout": 1.0}, r"model\.dropout=1\.0 must be at least 0 and below 1"),
        (ModelConfig, {"context": 0}, r"model\.context=0 must be at least 1"),
    ],
)
def test_values_that_make_no_run_are_refused(options, changes, message):
    with pytest.raises(TrainError, match=message):
        options(**changes)
