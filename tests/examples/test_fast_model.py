"""Speed options do not change results: tables, loss, attention, scan, recomputation, parts of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from examples.train import attention, cross_entropy, embedding, step
from examples.train.config import Config
from examples.train.data import Batch
from examples.train.errors import TrainError
from examples.train.initialising import draw, shapes
from examples.train.model import QueriesKeysValues, language_model
from examples.train.norm import Dropout, rms_norm
from examples.train.optimizer import is_matrix, make_optimizer
from examples.train.placing import make_mesh
from examples.train.presets import TOY
from tests.test_quantile import expected_target
from tests.tolerances import assert_close, assert_trees_close, relative_error


def tokens_of(kind: str, rng, shape, rows: int) -> np.ndarray:
    """Tokens that hit the rows of a table evenly, as text does, or all one row."""
    if kind == "even":
        return rng.integers(0, rows, shape)
    if kind == "text":
        return np.minimum(rng.zipf(1.3, shape) - 1, rows - 1)
    return np.full(shape, rows - 1)


@pytest.mark.parametrize("sums", [embedding.one_hot_sum, embedding.sorted_sum])
@pytest.mark.parametrize("kind", ["even", "text", "one"])
@pytest.mark.parametrize(("rows", "shape"), [(256, (3, 171)), (5000, (2, 700)), (3, (1, 1)), (2, (2, 256))])
def test_gradient_of_a_table_is_the_sum_of_each_row(rng, sums, kind, rows, shape):
    tokens, values = tokens_of(kind, rng, shape, rows), rng.normal(size=(*shape, 6)).astype(np.float32)
    expected = np.zeros((rows, 6))
    np.add.at(expected, tokens, values.astype(np.float64))
    total = jax.jit(sums, static_argnums=2)(jnp.asarray(tokens), jnp.asarray(values), rows)
    assert_close(total, expected, "float32")
    assert not np.any(np.asarray(total)[np.setdiff1d(np.arange(rows), tokens)]), "a row without tokens is exactly zero"


@pytest.mark.parametrize("sums", [embedding.one_hot_sum, embedding.sorted_sum])
def test_gradient_of_a_table_adds_bfloat16_in_float32(rng, sums):
    """Ten thousand ones: a sum in bfloat16 would stop at 256."""
    tokens = jnp.zeros((10, 1000), jnp.int32)
    total = jax.jit(sums, static_argnums=2)(tokens, jnp.ones((10, 1000, 4), jnp.bfloat16), 3000)
    np.testing.assert_array_equal(total[0], 10_000)


@pytest.mark.parametrize("rows", [256, 3000])
def test_a_table_over_a_mesh_has_the_gradient_of_one_device(rng, rows):
    table = jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32)
    tokens = jnp.asarray(tokens_of("text", rng, (8, 50), rows))
    weights = jnp.asarray(rng.normal(size=(8, 50, 4)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda table: jnp.sum(weights * embedding.embed(table, tokens, "float32"))))
    with jax.set_mesh(make_mesh("data=2,expert=4", 8)):
        spread = jax.device_get(gradient(table))
    expected = np.zeros((rows, 4))
    np.add.at(expected, np.asarray(tokens), np.asarray(weights, np.float64))
    assert_close(spread, expected, "float32")


@pytest.mark.parametrize(("most", "chunks"), [(2**27, 1), (200, 6), (1, 12)])
def test_cross_entropy_in_chunks_is_that_of_all_logits(rng, monkeypatch, most, chunks):
    monkeypatch.setattr(cross_entropy, "LOGITS", most)
    assert cross_entropy.chunk_count(2, 12, 50) == chunks
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 12, 8), (8, 50)))
    targets, weights = rng.integers(0, 50, (2, 12)), rng.uniform(size=(2, 12)).astype(np.float32)
    # By hand, in float64: sum of w (log sum exp - logit), and w (softmax - one hot) behind each logit.
    logits = x.astype(np.float64) @ kernel
    normaliser = np.log(np.exp(logits).sum(-1, keepdims=True))
    hot = np.eye(50)[targets]
    expected = np.sum(weights * (normaliser[..., 0] - (logits * hot).sum(-1)))
    dlogits = weights[..., None] * (np.exp(logits - normaliser) - hot)

    def loss(x, kernel):
        return cross_entropy.cross_entropy(x, kernel, jnp.asarray(targets), jnp.asarray(weights))

    assert_close(jax.jit(loss)(x, kernel), expected, "float32")
    value, (dx, dkernel) = jax.jit(jax.value_and_grad(lambda x, kernel: 3 * loss(x, kernel), (0, 1)))(x, kernel)
    assert_close(value, 3 * expected, "float32")
    assert_close(dx, 3 * dlogits @ kernel.T, "float32")
    assert_close(dkernel, 3 * np.einsum("btd,btv->dv", x, dlogits), "float32")


def test_loss_of_a_large_vocabulary_never_holds_all_logits(monkeypatch):
    """No array of the compiled gradient has batch x time x vocabulary elements."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 8 * 1000)
    x, kernel = jnp.zeros((2, 64, 8)), jnp.zeros((8, 1000))
    gradient = jax.jit(jax.grad(cross_entropy.cross_entropy, (0, 1)))
    text = gradient.lower(x, kernel, jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))).compile().as_text()
    assert "[2,4,1000]" in text
    assert "[2,64,1000]" not in text
    assert "[128,1000]" not in text


def test_norm_and_its_gradient_are_those_of_flax(rng):
    x, scale, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 16), 16, (3, 5, 16)))

    def of_flax(x, scale):
        return nn.RMSNorm().apply({"params": {"scale": scale}}, x)

    for norm in (rms_norm, jax.jit(rms_norm)):
        assert_close(norm(x, scale), of_flax(x, scale), "float32")
    gradients, expected = (
        jax.grad(lambda x, scale, norm=norm: jnp.sum(weights * norm(x, scale)), (0, 1))(x, scale)
        for norm in (rms_norm, of_flax)
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient, wanted, "float32")


def test_rotated_norm_and_its_gradient_are_those_of_flax_and_complex_numbers(rng):
    x, scale, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 3, 16), 16, (2, 7, 3, 16)))
    x[0, 0, 0] = 0
    table = attention.rotary_table(jnp.arange(5, 12), 16, "float32")

    def expected(x, scale):
        first, second = jnp.split(nn.RMSNorm().apply({"params": {"scale": scale}}, x), 2, axis=-1)
        angle = jnp.arange(5, 12)[:, None, None] / 10_000 ** (jnp.arange(8) / 8)
        rotated = (first + 1j * second) * jnp.exp(1j * angle)
        return jnp.concatenate([rotated.real, rotated.imag], axis=-1)

    def ours(x, scale):
        return attention.normalise_and_rotate(x, scale, table)

    assert_close(jax.jit(ours)(x, scale), expected(x, scale), "float32")
    gradients, wanted = (
        jax.jit(jax.grad(lambda x, scale, f=f: jnp.sum(weights * f(x, scale)), (0, 1)))(x, scale)
        for f in (ours, expected)
    )
    for gradient, one in zip(gradients, wanted, strict=True):
        assert_close(gradient, one, "float32")


def test_projections_of_attention_are_those_of_one_dense_layer(rng):
    """The parameters too: a checkpoint does not tell them apart."""
    x = rng.normal(size=(2, 5, 12)).astype(np.float32)
    weights = rng.normal(size=(2, 5, 3, 2, 6)).astype(np.float32)
    dense, ours = nn.DenseGeneral((3, 2, 6), use_bias=False), QueriesKeysValues(2, "float32")
    params = ours.init(jax.random.key(3), x)
    np.testing.assert_array_equal(params["params"]["kernel"], dense.init(jax.random.key(3), x)["params"]["kernel"])

    def stacked(params, x):
        return jnp.stack(ours.apply(params, x), axis=2)

    assert_close(jax.jit(stacked)(params, x), dense.apply(params, x), "float32")
    gradients, expected = (
        dict(enumerate(jax.grad(lambda params, x, f=f: jnp.sum(weights * f(params, x)), (0, 1))(params, x)))
        for f in (stacked, dense.apply)
    )
    assert_trees_close(gradients, expected, "float32")


def test_dropout_keeps_the_mean_and_drops_as_many_as_it_says():
    dropout, x = Dropout(0.25, False), jnp.ones((400, 1001))
    y = dropout.apply({}, x, rngs={"dropout": jax.random.key(0)})
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.01
    assert set(np.unique(y)) == {0, np.float32(4 / 3)}
    np.testing.assert_array_equal(Dropout(0.25, True).apply({}, x), x)


@pytest.mark.parametrize("how", ["blocks", "xla"])
def test_attention_stays_within_documents(rng, how):
    """Against softmax over the visible keys, position by position."""
    q, k, v = (rng.normal(size=(2, 21, 2, 8)).astype(np.float32) for _ in range(3))
    documents = np.cumsum(rng.uniform(size=(2, 21)) < 0.2, axis=1)
    y = jax.jit(attention.attend, static_argnums=3)(q, k, v, how, jnp.asarray(documents))
    expected = np.zeros(q.shape)
    for b, t, h in np.ndindex(2, 21, 2):
        seen = [s for s in range(t + 1) if documents[b, s] == documents[b, t]]
        scores = k[b, seen, h].astype(np.float64) @ q[b, t, h] / 8**0.5
        weights = np.exp(scores - scores.max())
        expected[b, t, h] = weights / weights.sum() @ v[b, seen, h]
    assert_close(y, expected, "float32")


def test_attention_is_chosen_for_the_machine():
    assert attention.choose_attention("auto", TOY.model) == "blocks"
    assert attention.choose_attention("xla", TOY.model) == "xla"
    with pytest.raises(
        TrainError, match=r"--attention cudnn cannot run: it needs an NVIDIA GPU, and JAX computes on cpu"
    ):
        attention.choose_attention("cudnn", TOY.model)


DEEP = dataclasses.replace(TOY, model=dataclasses.replace(TOY.model, layers=3), bias_update_rate=0.01)


def first_steps(config: Config, batch: Batch, mesh: Mesh | None = None, steps: int = 2, start=None):
    """The state and the metrics after some steps on one batch, from a given state or from the model's own first one."""
    mesh = mesh or make_mesh("", config.batch_size)
    model, optimizer = language_model(config), make_optimizer(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        if start is None:
            state = step.init_state_on(model, optimizer, config.seed, mesh)
        else:
            state = jax.device_put(start, step.state_shardings(model, optimizer, mesh))
        train_step = step.make_train_step(model, optimizer, mesh, accumulate=config.accumulate)
        for _ in range(steps):
            state, metrics = train_step(state, batch)
    return jax.device_get(state), jax.device_get(metrics)


def stacked(params):
    """The blocks but the first of an unrolled model, as the scanned one keeps them."""
    layers = [params[name] for name in sorted(params) if name.startswith("block_") and name != "block_00"]
    rest = {name: part for name, part in params.items() if not name.startswith("block_") or name == "block_00"}
    return rest | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


@pytest.fixture(scope="module")
def batch():
    shape = (TOY.batch_size, TOY.model.context + 1)
    return Batch(np.random.default_rng(1).integers(0, 256, shape, np.uint8))


@pytest.fixture(scope="module")
def first():
    """The first state of the unrolled model."""
    model, optimizer = language_model(DEEP), make_optimizer(DEEP.optimizer, DEEP.steps)
    return jax.device_get(step.init_state_on(model, optimizer, DEEP.seed, make_mesh("", DEEP.batch_size)))


@pytest.fixture(scope="module")
def first_scanned():
    """The first state of the scanned model, which draws it by itself."""
    config = dataclasses.replace(DEEP, scan_layers=True)
    model, optimizer = language_model(config), make_optimizer(config.optimizer, config.steps)
    return jax.device_get(step.init_state_on(model, optimizer, config.seed, make_mesh("", config.batch_size)))


@pytest.fixture(scope="module")
def unrolled(batch, first):
    return first_steps(DEEP, batch, start=first)


def test_quantiles_move_the_bias_by_the_targets_of_all_parts(batch, first):
    """The target is from tests/test_quantile.py, from router scores in float64."""
    config = dataclasses.replace(
        TOY, switch_loss_coef=0.0, bias_update="quantile", bias_update_rate=0.5, accumulate=2, batch_size=4
    )
    start = first._replace(
        params={name: part for name, part in first.params.items() if name != "block_02"},
        correction_bias={"block_01": first.correction_bias["block_01"]},
    )
    model, optimizer, mesh = language_model(config), optax.set_to_zero(), make_mesh("", config.batch_size)
    start = start._replace(opt_state=optimizer.init(start.params))
    small = Batch(batch.tokens[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(start, step.state_shardings(model, optimizer, mesh))
        state, _ = step.make_train_step(model, optimizer, mesh, accumulate=config.accumulate)(placed, small)
    capture = {"capture_intermediates": lambda module, _: module.name == "mlp_norm", "mutable": ["intermediates"]}
    apply = jax.jit(lambda tokens: model.apply(step.variables_of(start), tokens, **capture)[1])
    x = np.float64(apply(small.tokens[:, :-1])["intermediates"]["block_01"]["mlp_norm"]["__call__"][0][1])
    scores = 1 / (1 + np.exp(-x @ np.float64(start.params["block_01"]["mlp"]["router"]["kernel"])))
    parts = [scores[i::2].reshape(-1, scores.shape[-1]) for i in (0, 1)]
    targets = [expected_target(part, np.zeros(8), 2, np.ones(len(part), bool)) for part in parts]
    moved = 0.5 * np.mean(targets, axis=0)
    found = state.correction_bias["block_01"]["mlp"]["router"]["bias"]
    np.testing.assert_allclose(found, moved - moved.mean(), rtol=1e-4, atol=1e-5)
    assert np.abs(found).max() > 1e-3


@pytest.mark.parametrize("changes", [{"remat": "cheap", "attention": "xla"}, {"remat": "layer", "accumulate": 4}])
def test_options_for_speed_train_the_same(batch, first, unrolled, changes):
    state, metrics = first_steps(dataclasses.replace(DEEP, **changes), batch, start=first)
    wanted, wanted_metrics = unrolled
    assert_close(metrics.loss, wanted_metrics.loss, "float32")
    assert_close(metrics.grad_norm, wanted_metrics.grad_norm, "float32")
    np.testing.assert_array_equal(metrics.loads, wanted_metrics.loads)
    assert_trees_close(state.correction_bias, wanted.correction_bias, "float32")
    # Adam divides by the root of the squared gradient, so rounding moves parameters with a gradient near zero.
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params), strict=True):
        assert relative_error(leaf, other) < 1e-4


@pytest.mark.parametrize(
    "changes", [{"remat": "cheap"}, {"remat": "layer"}, {"accumulate": 2, "mesh": "fsdp=2,expert=2"}]
)
def test_scanned_layers_train_as_unrolled_ones(batch, unrolled, first_scanned, changes):
    wanted, wanted_metrics = unrolled
    config = dataclasses.replace(DEEP, scan_layers=True, **changes)
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    state, metrics = first_steps(config, batch, mesh, start=first_scanned)
    assert_close(metrics.loss, wanted_metrics.loss, "float32")
    assert_close(metrics.grad_norm, wanted_metrics.grad_norm, "float32")
    np.testing.assert_array_equal(metrics.loads, wanted_metrics.loads)
    biases = [wanted.correction_bias[name]["mlp"]["router"]["bias"] for name in sorted(wanted.correction_bias)]
    np.testing.assert_array_equal(state.correction_bias["blocks"]["mlp"]["router"]["bias"], np.stack(biases))
    expected = stacked(wanted.params)
    assert jax.tree.structure(state.params) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        assert relative_error(leaf, other) < (1e-3 if config.mesh else 1e-4)


def test_documents_weigh_the_same_in_parts_as_in_one(batch):
    """The parts have different numbers of scored tokens, and each token of the batch has the same weight."""
    starts = np.random.default_rng(2).uniform(size=batch.tokens.shape) < np.linspace(0.01, 0.5, 8)[:, None]
    split = Batch(batch.tokens, starts)
    small = dataclasses.replace(TOY, mlp="dense", model=dataclasses.replace(TOY.model, layers=1))
    whole, parts = (first_steps(dataclasses.replace(small, accumulate=n), split)[1] for n in (1, 4))
    assert_close(parts.loss, whole.loss, "float32")
    assert_close(parts.grad_norm, whole.grad_norm, "float32")


def test_the_switch_loss_reaches_the_optimiser(batch):
    """It has no part by default. With a coefficient it is at least that of even loads, a layer."""
    plain, balanced = (
        first_steps(dataclasses.replace(DEEP, switch_loss_coef=coef), batch, steps=1)[1] for coef in (0.0, 0.5)
    )
    routed = DEEP.model.layers - 1  # the first block is dense
    assert plain.auxiliary_loss == 0
    assert balanced.auxiliary_loss >= 0.5 * routed * (1 - 1e-5)
    assert balanced.loss == plain.loss, "both are the first step's text alone"
    assert balanced.grad_norm != plain.grad_norm


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("mlp", ["latent_moe", "dense"])
def test_parameters_are_drawn_as_the_model_asks_for_them(scan_layers, mlp):
    model = language_model(dataclasses.replace(DEEP, mlp=mlp, scan_layers=scan_layers))
    params, biases = jax.jit(lambda key: draw(model, key))(jax.random.key(0))
    wanted = nn.unbox(shapes(model))
    for tree, expected in ((params, wanted["params"]), (biases, wanted.get("correction_bias", {}))):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), expected
        )
    kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(params) if np.unique(leaf).size > 1]
    layers = [part for leaf in kernels for part in (leaf if leaf.shape[0] == DEEP.model.layers - 1 else [leaf])]
    assert len({part.tobytes() for part in layers}) == len(layers), "no two kernels are drawn alike"
    flags = is_matrix(params)
    layer = flags["blocks" if scan_layers else "block_02"]
    assert layer["attention"]["qkv"]["kernel"]
    assert not layer["mlp_norm"]["scale"], "a norm's scale does not decay, stacked or not"


def test_a_batch_that_parts_do_not_divide_is_refused():
    with pytest.raises(
        TrainError, match=r"--batch-size 8 must be a multiple of 6: --accumulate 3 makes 3 parts, and 2 device"
    ):
        make_mesh("data=2", 8, 3)
