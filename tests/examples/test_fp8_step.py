"""Training in FP8: a step encodes each weight once, and no checkpoint holds codes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from examples.train import step
from examples.train.checkpoint import Checkpoints, Snapshot
from examples.train.data import Batch
from examples.train.model import language_model
from examples.train.optimizer import make_optimizer
from examples.train.placing import make_mesh
from examples.train.presets import TOY
from tests.examples.runs import assert_same_bits
from tests.programs import e4m3_arrays

CONFIG = dataclasses.replace(
    TOY, precision="fp8", accumulate=2, batch_size=4, steps=4, model=dataclasses.replace(TOY.model, layers=3)
)


def parts_of(config):
    """The mesh, the shapes of the state, the first state and the step."""
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    model, optimizer = language_model(config), make_optimizer(config.optimizer, config.steps)
    shapes = step.state_shapes(model, optimizer, mesh)
    train_step = step.make_train_step(model, optimizer, mesh, accumulate=config.accumulate)
    return mesh, shapes, functools.partial(step.init_state_on, model, optimizer, config.seed, mesh), train_step


@pytest.mark.parametrize("changes", [{"remat": "layer"}, {"remat": "cheap", "scan_layers": True}], ids=str)
def test_a_step_encodes_each_weight_once(changes):
    """Two layers, two parts of the batch and a recomputation, and no weight is encoded within a loop."""
    config = dataclasses.replace(CONFIG, **changes)
    mesh, shapes, _, train_step = parts_of(config)
    batch = Batch(jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.uint8))
    with jax.set_mesh(mesh):
        program = train_step.trace(shapes, batch).jaxpr
    weights = [(np.prod(shape), in_loop) for shape, in_loop in e4m3_arrays(program) if len(shape) > 2]
    size = config.model.num_experts * config.model.latent_size * config.model.expert_intermediate_size
    stacked = 2 if config.scan_layers else 1
    assert weights == [(stacked * size, False)] * (4 // stacked)


def test_a_run_resumes_to_the_bit(tmp_path):
    """The checkpoint has the tree of one in the model's dtype, so either kind of run resumes from the other's."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, layers=2))
    mesh, shapes, first, train_step = parts_of(config)
    assert jax.tree.structure(shapes) == jax.tree.structure(parts_of(dataclasses.replace(config, precision="dtype"))[1])
    batch = Batch(np.random.default_rng(1).integers(0, 256, (4, config.model.context + 1), np.uint8))
    with jax.set_mesh(mesh):
        state, _ = train_step(first(), batch)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(Snapshot(state, {}, 0.0))
        checkpoints.close()
        wanted, metrics = train_step(state, batch)
        restored = Checkpoints(tmp_path)
        resumed, _ = train_step(restored.restore(shapes).state, batch)
        restored.close()
    assert_same_bits(resumed, wanted)
    assert np.isfinite(metrics.loss)
