"""Sequences split over a mesh: losses by sequence and document, capacity, sinkhorn and jitter as on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_latent_moe import ParallelConfig, RouterConfig, latent_moe, param_shapes
from jax_latent_moe.parallel import token_spec
from tests import cases, layers
from tests.parallel.meshes import BASE, make_mesh

ROUTER = RouterConfig(switch_loss_coef=0.3, sequence_loss_coef=0.2, global_loss_coef=0.1, z_loss_coef=0.1)
SINKHORN = dataclasses.replace(
    ROUTER, selection="sinkhorn", score_function="softmax", norm_topk_prob=False, correction_bias=False
)


def check(rng, router, leading, names, sizes, packed=False, masked=True):
    case = cases.random_inputs(rng, dataclasses.replace(BASE, router=router), leading, masked=masked)
    case = case._replace(segment_ids=rng.integers(2, size=leading) if packed else None)
    with jax.set_mesh(make_mesh(*sizes, names=names)):
        layers.check_against_oracle(case)


@pytest.mark.parametrize(
    ("leading", "names", "sizes", "packed"),
    [
        ((2, 4), ("sequence",), (2,), False),
        ((2, 4), ("data", "sequence"), (2, 2), True),
        ((8,), ("expert", "sequence"), (2, 2), True),  # one sequence, which both axes split
    ],
    ids=str,
)
def test_losses_of_split_sequences(rng, leading, names, sizes, packed):
    check(rng, ROUTER, leading, names, sizes, packed)


def test_three_leading_axes_and_a_tensor_axis(rng):
    check(rng, ROUTER, (2, 2, 4), ("sequence", "tensor"), (4, 2), packed=True)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_is_in_the_order_of_x(rng, policy):
    """A device holds parts of several sequences; "position" drops by the place in x as a whole."""
    router = dataclasses.replace(ROUTER, capacity_factor=0.5, drop_policy=policy)
    check(rng, router, (4, 4), ("data", "sequence"), (2, 2))


def test_sinkhorn_is_over_all_tokens(rng):
    check(rng, SINKHORN, (2, 4), ("data", "sequence"), (2, 2))


def test_jitter_does_not_depend_on_the_mesh(rng):
    check(rng, dataclasses.replace(ROUTER, input_jitter=0.25), (2, 4), ("data", "sequence"), (2, 2))


def test_sizes_that_the_devices_do_not_divide_are_padded(rng, monkeypatch):
    """As for other axes: replicated if there are few tokens, padded along both axes otherwise."""
    router = dataclasses.replace(ROUTER, input_jitter=0.25)
    check(rng, router, (3, 5), ("data", "sequence"), (2, 2), packed=True)
    monkeypatch.setattr("jax_latent_moe.parallel.mesh.REPLICATED_TOKENS", 0)
    check(rng, router, (3, 5), ("data", "sequence"), (2, 2), packed=True, masked=False)


def test_sharding_of_tokens():
    parallel = ParallelConfig(sequence_axis="context")
    mesh = make_mesh(2, 2, 1, names=("data", "context", "expert"))
    assert token_spec(parallel, mesh) == P(("data",), ("context",))
    assert token_spec(parallel, mesh, ndim=2) == P(("data", "context"))
    assert token_spec(parallel, mesh, ndim=4) == P(("data",), None, ("context",))
    assert token_spec(parallel, make_mesh(2, names=("tensor",))) == P()


def test_a_device_holds_its_part_alone(rng):
    """No device gathers the tokens of others: on 4 devices, each runs a quarter."""
    config = dataclasses.replace(BASE, router=ROUTER)
    x = jax.ShapeDtypeStruct((2, 8, 16), np.float32)
    with jax.set_mesh(make_mesh(4, names=("sequence",))):
        text = str(jax.make_jaxpr(latent_moe, static_argnums=2)(param_shapes(config), x, config))
    assert "f32[2,2,16]" in text
    assert "all_gather" not in text
