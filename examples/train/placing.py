"""The mesh of a run, and the shardings of state and batches on it."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from examples.train.errors import TrainError
from jax_latent_moe import ParallelConfig
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.parallel import axis_sizes, logical_axis_rules, mesh_sizes, token_spec

PARALLEL = ParallelConfig()
LAYERS = "blocks"
"""Name of the scanned blocks in the parameter tree. Their parameters are stacked along the first axis."""


def make_mesh(text: str, batch_size: int, accumulate: int = 1) -> Mesh:
    """The mesh that --mesh describes. Its axes are data, fsdp, expert and tensor, in this order.

    Args:
        text: such as "data=2,expert=4". Empty text takes the first device. With several processes it takes all devices
            along the data axis.
        batch_size: windows in a step, a multiple of the numbers of devices and processes.
        accumulate: parts of a batch. The devices must divide each part.

    Raises:
        TrainError: the text is malformed, or the mesh does not fit the devices, the processes or the batch.
    """
    try:
        named = mesh_sizes(text)
    except ConfigError as error:
        raise TrainError(str(error)) from error
    if not text and jax.process_count() > 1:
        named = {PARALLEL.data_axis: jax.device_count()}
    sizes = [named.get(axis, 1) for axis in PARALLEL.axes]
    needed, there = math.prod(sizes), jax.device_count()
    if needed > there or (jax.process_count() > 1 and needed < there):
        raise TrainError(
            f"--mesh {text} takes {needed} devices and there are {there}: choose a mesh of at most {there} devices. "
            "Several processes must use all of them."
        )
    if jax.process_count() > 1 and jax.local_device_count() % sizes[-1]:
        raise TrainError(
            f"--mesh {text}: tensor={sizes[-1]} must divide the {jax.local_device_count()} devices of a process."
        )
    mesh = jax.make_mesh(sizes, PARALLEL.axes, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:needed])
    splits = math.prod(sizes[:3])
    if accumulate > 1 and batch_size % (splits * accumulate):
        raise TrainError(
            f"--batch-size {batch_size} must be a multiple of {splits * accumulate}: --accumulate {accumulate} makes "
            f"{accumulate} parts, and {splits} device(s) split each of them."
        )
    if batch_size % splits or batch_size % jax.process_count():
        raise TrainError(
            f"--batch-size {batch_size} must be a multiple of the {splits} devices that split it "
            f"(data x fsdp x expert) and of the {jax.process_count()} processes."
        )
    return mesh


def variable_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """The shardings of the variables. They follow the logical axes.

    A kernel without logical axes is split over fsdp along its first axis that fsdp divides.

    Args:
        boxed: the shapes that `init` gives, in Flax's boxes.
        mesh: the mesh of the run.
    """
    rules, fsdp = [*logical_axis_rules(PARALLEL, mesh), ("layers", None)], PARALLEL.fsdp_axis
    size = axis_sizes(PARALLEL, mesh)[fsdp]

    def place(path, leaf) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, nn.logical_to_mesh_axes(leaf.names, rules) or PartitionSpec())
        stacked = int(is_stacked(path))
        kernel = leaf.ndim - stacked > 1 and size > 1
        divided = [i for i in range(stacked, leaf.ndim) if kernel and leaf.shape[i] % size == 0]
        return NamedSharding(mesh, PartitionSpec(*[fsdp if i in divided[:1] else None for i in range(leaf.ndim)]))

    return jax.tree_util.tree_map_with_path(
        place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def is_stacked(path) -> bool:
    """Whether the path leads into scanned blocks. Their parameters have one more axis in front."""
    return any(getattr(entry, "key", None) == LAYERS for entry in path)


def optimizer_shardings(opt_state: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """The shardings of the optimiser's state. A leaf lies with the parameter that its path ends in.

    Every other leaf is on all devices.

    Args:
        opt_state: the shapes of the state.
        params: the shardings of the parameters.
        mesh: the mesh of the run.
    """
    whole, of_param = NamedSharding(mesh, PartitionSpec()), dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path, leaf) -> NamedSharding:
        del leaf
        return next((of_param[path[i:]] for i in range(len(path)) if path[i:] in of_param), whole)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, which is split along its first axis."""
    return NamedSharding(mesh, token_spec(PARALLEL, mesh))


def from_own_part[T](part: T, mesh: Mesh) -> T:
    """Places a batch on the devices. Each process gives the part that it has read."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(part, sharding)
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharding), part)


def from_whole(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """Places a batch on the devices. Every process gives the whole batch."""
    return jax.make_array_from_callback(batch.shape, batch_sharding(mesh), lambda index: batch[index])


def whole_on_one_device(tree: Any) -> Any:
    """The whole tree on the first device of this process. Every process must call it."""

    def gathered(leaf):
        if leaf.is_fully_addressable:
            return leaf
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.jit(lambda x: x, out_shardings=replicated)(leaf).addressable_data(0)

    return jax.device_put(jax.tree.map(gathered, tree), jax.local_devices()[0])
