"""ragged_all_to_all, which CPUs lack: its values with a stand-in for the collective, and its program for GPUs."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import lax

from jax_latent_moe import ParallelConfig, UnsupportedError, latent_moe
from jax_latent_moe.device import Device
from jax_latent_moe.parallel import choice
from tests import cases, layers
from tests.parallel import ragged
from tests.parallel.meshes import BASE, make_mesh

RAGGED = dataclasses.replace(BASE, parallel=ParallelConfig(dispatch="ragged_all_to_all"))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "current_device", lambda: Device("gpu", "NVIDIA H200"))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("uneven", [False, True])
def test_values(rng, monkeypatch, uneven):
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged.ragged_all_to_all)
    case = cases.random_inputs(rng, RAGGED, (8, 3), masked=True)
    if uneven:
        case.params["router"]["bias"][:3] += 8
    with jax.set_mesh(make_mesh(1, 2, 4, 1)):
        layers.compiled.cache_clear()
        layers.check_against_oracle(case)
    layers.compiled.cache_clear()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_lowers_for_gpus_with_gradients(rng):
    case = cases.draw(rng, RAGGED, (8, 3))
    params = layers.cast(case.params, "float32")
    with jax.set_mesh(make_mesh(1, 1, 8, 1)):
        gradient = jax.jit(jax.grad(lambda params, x: latent_moe(params, x, RAGGED)[0].sum()))
        lowered = gradient.trace(params, np.float32(case.x)).lower(lowering_platforms=("cuda",))
    assert "ragged_all_to_all" in lowered.as_text()


def test_cpus_refuse_it(rng):
    case = cases.draw(rng, RAGGED, (8, 3))
    message = (
        r"dispatch 'ragged_all_to_all' cannot run this: XLA has no such collective on CPUs. Use dispatch='all_gather'"
    )
    with jax.set_mesh(make_mesh(1, 1, 8, 1)), pytest.raises(UnsupportedError, match=message):
        latent_moe(layers.cast(case.params, "float32"), case.x, RAGGED)
