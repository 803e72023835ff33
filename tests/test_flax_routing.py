"""Documents, counts of a step and jitter through the Flax modules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jax_latent_moe.linen
import jax_latent_moe.nnx
from jax_latent_moe import InputError, RouterConfig, init_params, latent_moe
from tests.cases import TOY

CONFIG = dataclasses.replace(
    TOY, router=RouterConfig(sequence_loss_coef=0.2, global_loss_coef=0.3, bias_update_rate=0.25)
)
JITTER = dataclasses.replace(TOY, router=RouterConfig(input_jitter=0.25, bias_update_rate=0.0))


def params_of(config):
    return init_params(jax.random.key(0), config)


@pytest.fixture(scope="module")
def microbatches():
    rng = np.random.default_rng(0)
    return [(jnp.float32(rng.normal(size=(2, 4, 12))), rng.integers(2, size=(2, 4))) for _ in range(2)]


@pytest.fixture(scope="module")
def expected(microbatches):
    """Losses and counts of the pure function."""
    counts, found = None, []
    for x, ids in microbatches:
        _, aux = latent_moe(params_of(CONFIG), x, CONFIG, segment_ids=ids, global_counts=counts)
        counts = aux.global_counts
        found.append(aux)
    return found


def test_linen(microbatches, expected):
    layer = jax_latent_moe.linen.LatentMoE(CONFIG)
    variables = jax_latent_moe.linen.from_params(params_of(CONFIG), CONFIG)
    for (x, ids), aux in zip(microbatches, expected, strict=True):
        _, sown = layer.apply(variables, x, segment_ids=ids, mutable=["losses", "intermediates", "global_counts"])
        for name, loss in aux.losses.items():
            assert float(sown["losses"][name][0]) == pytest.approx(float(loss))
        variables = {**variables, "global_counts": sown["global_counts"]}
        np.testing.assert_array_equal(*jax.tree.leaves(variables["global_counts"]), aux.global_counts)
    _, sown = layer.apply(variables, x, mutable=["losses", "intermediates"])  # evaluation changes nothing
    assert "global_counts" not in sown
    after = jax_latent_moe.linen.after_step(variables, sown, 0.25)
    assert not np.any(jax.tree.leaves(after["global_counts"]))
    fresh = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert jax.tree.structure(fresh) == jax.tree.structure(jax_latent_moe.linen.from_params(params_of(CONFIG), CONFIG))


def test_linen_stacked_layers(microbatches):
    """nn.scan over layers, each with its own counts."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jax_latent_moe.linen.LatentMoE(CONFIG)(x), None

    kinds = {"params": 0, "correction_bias": 0, "losses": 0, "intermediates": 0, "global_counts": 0}
    stack = nn.scan(Block, variable_axes=kinds, split_rngs={"params": True}, length=2)()
    x = microbatches[0][0]
    made = jax.eval_shape(lambda: stack.init(jax.random.key(0), x, None))
    assert jax.tree.leaves(made["global_counts"])[0].shape == (2, 8)


def test_nnx(microbatches, expected):
    model = jax_latent_moe.nnx.from_params(params_of(CONFIG), CONFIG)
    capture = nnx.capture(model, jax_latent_moe.nnx.AuxiliaryLoss, nnx.Intermediate)
    for (x, ids), aux in zip(microbatches, expected, strict=True):
        _, losses, sown = capture(x, segment_ids=ids)
        assert float(jax_latent_moe.nnx.total_loss(losses)) == pytest.approx(float(sum(aux.losses.values())))
        np.testing.assert_array_equal(model.global_counts[...], aux.global_counts)
    model(x)  # evaluation changes nothing
    np.testing.assert_array_equal(model.global_counts[...], expected[-1].global_counts)
    jax_latent_moe.nnx.update_correction_bias(model, sown)
    assert not np.any(model.global_counts[...])


@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_jitter(microbatches, flax):
    x, params = microbatches[0][0], params_of(JITTER)

    def run(params, jitters):
        if flax == "linen":
            variables = jax_latent_moe.linen.from_params(params, JITTER)
            rngs = {"jitter": jax.random.key(1)} if jitters else None
            return jax_latent_moe.linen.LatentMoE(JITTER).apply(variables, x, rngs=rngs)
        return jax_latent_moe.nnx.from_params(params, JITTER)(x, rngs=nnx.Rngs(jitter=1) if jitters else None)

    assert not np.array_equal(run(params, True), run(params, False))
    with pytest.raises(InputError, match="the linen module an rng 'jitter' or the nnx module rngs"):
        jax.eval_shape(jax.grad(lambda p: jnp.sum(run(p, False))), params)
    jax.eval_shape(jax.grad(lambda p: jnp.sum(run(p, True))), params)


def test_jitter_of_nnx_needs_its_stream(microbatches):
    model = jax_latent_moe.nnx.from_params(params_of(JITTER), JITTER)
    with pytest.raises(InputError, match=r"no stream 'jitter' for router.input_jitter: give nnx.Rngs\(jitter=seed\)"):
        model(microbatches[0][0], rngs=nnx.Rngs(dropout=1))
    default = model(microbatches[0][0], rngs=nnx.Rngs(1))
    assert not np.array_equal(default, model(microbatches[0][0]))
