"""The layer's parts on the axes of a mesh: who holds what, and how a function of one device's part is run on all."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import LatentMoEConfig, ParallelConfig
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.parallel.shards import ONE_DEVICE, Shards
from jax_latent_moe.params import Params, param_axes

Body = Callable[..., tuple[Any, Any]]

REPLICATED_TOKENS = 256
"""Up to this many tokens that the devices do not divide are computed on every device; more are padded instead.

Below it, the router, the projections and the shared expert take the time to read their kernels, which each device reads
whole in any case. Replicated tokens need one all-reduce, and padded ones four collectives.
"""


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes that a text such as "data=2,expert=4" names, axes as `ParallelConfig` calls them by default.

    Raises:
        ConfigError: it does not read so, or names an axis that the layer does not know, or one twice.
    """
    known, sizes = ParallelConfig().axes, {}
    for entry in filter(None, text.split(",")):
        axis, _, size = entry.partition("=")
        if axis not in known or axis in sizes or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise ConfigError(
                f"--mesh {text!r}: {entry!r} must be AXIS=SIZE, each of {', '.join(known)} at most once, such as "
                "data=2,expert=4."
            )
        sizes[axis] = int(size)
    return sizes


def axis_sizes(parallel: ParallelConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Devices along the data, fsdp, expert and tensor axes of the mesh; 1 where it has no such axis."""
    return {axis: mesh.shape.get(axis, 1) for axis in parallel.axes}


def logical_axis_rules(parallel: ParallelConfig, mesh: Mesh | AbstractMesh) -> list[tuple[str, str | None]]:
    """The mesh axis of each logical axis of `param_axes`, as Flax takes such rules.

    Args:
        parallel: names the axes.
        mesh: axes that it lacks, or has with size 1, split nothing.
    """
    sizes = axis_sizes(parallel, mesh)
    split = (
        ("expert", parallel.expert_axis),
        ("expert_intermediate", parallel.tensor_axis),
        ("shared_intermediate", parallel.tensor_axis),
        ("hidden", parallel.fsdp_axis),
        ("expert_latent", parallel.fsdp_axis),
    )
    return [*((name, axis if sizes[axis] > 1 else None) for name, axis in split), ("latent", None)]


def param_specs(config: LatentMoEConfig, mesh: Mesh | AbstractMesh) -> dict[str, dict[str, PartitionSpec]]:
    """How each parameter is split: experts over the expert axis, inner widths over tensor, the rest over fsdp.

    Args:
        config: the layer, with `parallel` set.
        mesh: the mesh, whose sizes must divide what they split.

    Raises:
        ConfigError: config.parallel is None, or an axis does not divide what it splits.
    """
    if config.parallel is None:
        raise ConfigError("parallel=None names no mesh axes: set parallel=ParallelConfig() in the layer's config.")
    _check_divides(config, mesh)
    rules = {None: None, **dict(logical_axis_rules(config.parallel, mesh))}
    return {
        part: {name: PartitionSpec(*(rules[axis] for axis in axes)) for name, axes in leaves.items()}
        for part, leaves in param_axes(config).items()
    }


def token_spec(parallel: ParallelConfig, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How the first axis of x is split: over data, fsdp and expert, in this order."""
    axes = _token_axes(parallel, mesh)
    return PartitionSpec(axes) if axes else PartitionSpec()


def in_auto_mode(
    run: Callable[..., tuple[Any, Any]],
    params: Params,
    x: Float[Array, "*batch d"],
    token_mask: Bool[Array, "*batch"] | None,
    expert_ids: Int[Array, "*batch k"] | None,
) -> tuple[Any, Any]:
    """run(params, x, token_mask, expert_ids), with mesh axes of type Explicit left to XLA while it runs.

    What is split as the tokens are has the sharding of x; what is one for all is replicated. No type says how a sort,
    a ragged product or a kernel splits its operands.
    """
    mesh = jax.typeof(x).sharding.mesh
    explicit = tuple(mesh.explicit_axes)
    if not explicit:
        return run(params, x, token_mask, expert_ids)
    spec = jax.typeof(x).sharding.spec
    by_token = PartitionSpec(*spec[:-1], None)
    shardings = (PartitionSpec(*spec), by_token, by_token), PartitionSpec()
    in_auto: Callable = jax.sharding.auto_axes(run, axes=explicit, out_sharding=shardings)
    return in_auto(params, x, token_mask, expert_ids)


def over_mesh(
    body: Body,
    config: LatentMoEConfig,
    params: Params,
    x: Float[Array, "*batch d"],
    token_mask: Bool[Array, "*batch"] | None,
    expert_ids: Int[Array, "*batch k"] | None,
) -> tuple[Any, Any]:
    """Runs body(shards, params, x, token_mask, expert_ids) on each device's part of the arguments.

    The mesh is the one that `jax.set_mesh` set. On one device, or without a mesh, the body is called as it is.

    Args:
        body: returns arrays that are split as the tokens are, and arrays that every device has whole.
        config: the layer, with `parallel` set.
        params: as `init_params` makes them; the body sees kernels whole but for its own experts and inner widths.
        x: [..., d]; the first axis is split.
        token_mask: [...].
        expert_ids: [..., k].

    Raises:
        ConfigError: an axis of the mesh does not divide what it splits, or is of type Manual.
    """
    parallel, mesh = config.parallel, jax.sharding.get_abstract_mesh()
    assert parallel is not None
    sizes = axis_sizes(parallel, mesh)
    if math.prod(sizes.values()) == 1:
        return body(ONE_DEVICE, params, x, token_mask, expert_ids)
    _check_axis_types(mesh, sizes)
    splits = math.prod(sizes[axis] for axis in _token_axes(parallel, mesh))
    replicated = x.ndim < 2 or (x.shape[0] % splits != 0 and math.prod(x.shape[:-1]) <= REPLICATED_TOKENS)
    rows = x.shape[:1]
    if not replicated and x.shape[0] % splits:
        x, token_mask, expert_ids = _pad_tokens(-rows[0] % splits, x, token_mask, expert_ids)
    shards = Shards(
        token_axes=() if replicated else _token_axes(parallel, mesh),
        sequences_split=x.ndim == 2,
        expert_axis=parallel.expert_axis if sizes[parallel.expert_axis] > 1 else None,
        tensor_axis=parallel.tensor_axis if sizes[parallel.tensor_axis] > 1 else None,
    )
    specs = param_specs(config, mesh)

    def local(params, x, token_mask, expert_ids):
        return body(shards, _gather(params, specs, parallel), x, token_mask, expert_ids)

    whole = PartitionSpec()
    split = whole if replicated else token_spec(parallel, mesh)
    mapped = jax.shard_map(
        local,
        in_specs=(specs, split, split, split),
        out_specs=(split, whole),
        axis_names={axis for axis in parallel.axes if axis in mesh.shape},
        # Kernels say nothing of the axes over which their outputs vary; Shards' sums are right without.
        check_vma=False,
    )
    by_token, totals = mapped(params, x, token_mask, expert_ids)
    if x.shape[:1] != rows:
        by_token = jax.tree.map(lambda value: value[: rows[0]], by_token)
    return by_token, totals


def _pad_tokens(count, x, token_mask, expert_ids):
    """The arguments with `count` masked rows after the others."""
    if token_mask is None:
        token_mask = jnp.ones(x.shape[:-1], bool)

    def pad(values):
        return None if values is None else jnp.pad(values, [(0, count)] + [(0, 0)] * (values.ndim - 1))

    return pad(x), pad(token_mask), pad(expert_ids)


def _token_axes(parallel, mesh) -> tuple[str, ...]:
    sizes = axis_sizes(parallel, mesh)
    return tuple(axis for axis in (parallel.data_axis, parallel.fsdp_axis, parallel.expert_axis) if sizes[axis] > 1)


def _gather(params: Params, specs, parallel: ParallelConfig) -> Params:
    """Kernels whole but for the axes that split the work: the device's own experts and inner widths."""
    split_work = (parallel.expert_axis, parallel.tensor_axis)

    def whole(leaf, spec, kept):
        for dimension, axis in enumerate(spec):
            if axis is not None and axis not in kept:
                leaf = jax.lax.all_gather(leaf, axis, axis=dimension, tiled=True)
        return leaf

    return {
        part: jax.tree.map(partial(whole, kept=() if part == "router" else split_work), leaves, specs[part])
        for part, leaves in params.items()
    }


def _check_divides(config, mesh):
    _, fsdp, expert, tensor = config.parallel.axes
    sizes = axis_sizes(config.parallel, mesh)
    for name, width, axis in (
        ("num_experts", config.num_experts, expert),
        ("expert_intermediate_size", config.expert_intermediate_size, tensor),
        ("shared_expert_intermediate_size", config.shared_expert_intermediate_size, tensor),
        ("hidden_size", config.hidden_size, fsdp),
        ("latent_size", config.latent_width, fsdp),
    ):
        if width % sizes[axis]:
            raise ConfigError(f"{name}={width} must be a multiple of the mesh's {axis}={sizes[axis]}, which splits it.")


def _check_axis_types(mesh, sizes):
    for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if axis in sizes and kind != AxisType.Auto:
            raise ConfigError(
                f"mesh axis '{axis}' is of type {kind.name}, and the layer maps over axes that are not mapped yet: "
                "leave parallel=None inside of a shard_map."
            )
