"""Gradients that devices add up in bfloat16: the loss keeps its bits, and the sums are those in float32, rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.train import step
from examples.train.data import Batch
from examples.train.model import language_model
from examples.train.placing import make_mesh
from examples.train.presets import TOY
from examples.train.reducing import READ_WIDE, shared_in
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(TOY, model=dataclasses.replace(TOY.model, dtype="bfloat16", latent_norm="post"))
MESHES = ("data=2", "fsdp=2", "data=2,fsdp=2,expert=2")


def first_gradients(mesh_name: str, reduce_dtype, **changes):
    """The gradients and the metrics of the first step, on a batch of one token in 7 of 8 windows."""
    config = dataclasses.replace(CONFIG, **changes)
    mesh = make_mesh(mesh_name, config.batch_size, config.accumulate)
    # Without decay, the trace is the gradient.
    model, keep = language_model(config), optax.trace(decay=0.0)
    tokens = np.full((config.batch_size, config.model.context + 1), 7, np.uint8)
    tokens[3] = np.random.default_rng(0).integers(0, 256, tokens.shape[1])
    with jax.set_mesh(mesh):
        state = step.init_state_on(model, keep, config.seed, mesh)
        run = step.make_train_step(model, keep, mesh, accumulate=config.accumulate, reduce_dtype=reduce_dtype)
        state, metrics = run(state, Batch(tokens))
    return jax.device_get(state.opt_state.trace), jax.device_get(metrics)


def kernels(gradients):
    """The gradients that may be reduced in bfloat16, by their paths."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if leaf.ndim > 1 and not {entry.key for entry in path}.intersection(READ_WIDE)
    }


@pytest.fixture(scope="module")
def alone():
    return first_gradients("", "float32")


@pytest.mark.parametrize("mesh", MESHES)
def test_the_loss_keeps_its_bits_and_sums_of_kernels_are_rounded(alone, mesh):
    gradients, metrics = first_gradients(mesh, "bfloat16")
    wide, wide_metrics = first_gradients(mesh, "float32")
    np.testing.assert_array_equal(metrics.loss, wide_metrics.loss)
    np.testing.assert_array_equal(metrics.loads, wide_metrics.loads)
    assert_close(metrics.loss, alone[1].loss, "bfloat16")
    for path, found in kernels(gradients).items():
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(found.astype(jnp.bfloat16), np.float32), path)
        assert_close(found, kernels(wide)[path], "bfloat16", path)


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    gradients, metrics = first_gradients("data=2", "bfloat16")
    idle = metrics.loads[0] == 0
    assert idle.any()
    assert not idle.all()
    for leaf in gradients["block_01"]["mlp"]["experts"].values():
        assert not np.any(leaf[idle])
        assert all(np.any(expert) for expert in leaf[~idle])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_two_parts_of_a_batch_add_up_in_bfloat16_and_more_in_float32(accumulate):
    parts, _ = first_gradients("data=2", "bfloat16", accumulate=accumulate)
    wide, _ = first_gradients("data=2", "float32", accumulate=accumulate)
    for path, found in kernels(parts).items():
        assert_close(found, kernels(wide)[path], "bfloat16", path)
    rounded = [np.array_equal(leaf, np.asarray(leaf.astype(jnp.bfloat16))) for leaf in kernels(parts).values()]
    assert all(rounded) == (accumulate == 2)


def test_float32_casts_nothing(alone):
    params, _ = alone
    assert shared_in(params, "float32") is params


@pytest.mark.parametrize("scan_layers", [False, True])
def test_routers_tables_and_norms_stay_in_float32(scan_layers):
    model = language_model(dataclasses.replace(CONFIG, scan_layers=scan_layers))
    params = jax.eval_shape(lambda: step.init_state(model, optax.identity(), 0)).params
    cast = jax.eval_shape(lambda tree: shared_in(tree, "bfloat16"), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        names = [entry.key for entry in path]
        wide = names[-1] == "scale" or {"router", "embed", "head"} & set(names)
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), names
