"""The layer over two GPUs by every dispatch, including the one that CPUs lack, against the oracle."""

import dataclasses

import jax
import pytest

from tests import cases, layers
from tests.parallel.meshes import BASE, make_mesh

pytestmark = pytest.mark.skipif(
    jax.devices()[0].platform != "gpu" or len(jax.devices()) < 2, reason="needs two GPUs, as JAX's default devices"
)


@pytest.mark.parametrize("capacity_factor", [None, 100.0])
@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_every_dispatch(rng, dispatch, capacity_factor):
    parallel = dataclasses.replace(BASE.parallel, dispatch=dispatch, capacity_factor=capacity_factor)
    config = dataclasses.replace(BASE, parallel=parallel)
    with jax.set_mesh(make_mesh(1, 1, 2, 1)):
        layers.check_against_oracle(cases.random_inputs(rng, config, (8, 3), masked=True))


@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2)], ids=["data", "fsdp", "tensor"])
def test_every_other_axis(rng, sizes):
    with jax.set_mesh(make_mesh(*sizes)):
        layers.check_against_oracle(cases.random_inputs(rng, BASE, (8, 3)))
