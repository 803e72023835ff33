"""Meshes of virtual CPU devices and layers that every one of them divides."""

import itertools
import math
import os

import jax
from jax.sharding import AxisType, Mesh

from jax_latent_moe import LatentMoEConfig, ParallelConfig, XlaBackend

AXES = ParallelConfig().axes
DEVICES = 8

SIZES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if 1 < math.prod(sizes) <= DEVICES]
"""Every (data, fsdp, expert, tensor) whose product divides 8, except a single device."""

WHOLE_MATRIX = "JAX_LATENT_MOE_ALL_MESHES" in os.environ
"""With this variable every strategy and norm runs on every mesh; without, some that are drawn. So do layers and their
dtypes in tests/test_layer.py.
"""

BASE = LatentMoEConfig(
    hidden_size=16,
    latent_size=8,
    num_experts=8,
    top_k=3,
    expert_intermediate_size=8,
    shared_expert_intermediate_size=8,
    dtype="float32",
    backend=XlaBackend(),
    parallel=ParallelConfig(),
)


def make_mesh(*sizes: int, names: tuple[str, ...] = AXES) -> Mesh:
    """A mesh over the first devices; sizes are those of data, fsdp, expert and tensor unless names say otherwise."""
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
