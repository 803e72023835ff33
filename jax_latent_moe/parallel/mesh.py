"""How the axes of a mesh split the layer's parts, and how a function of one device's part runs on all devices."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float

from jax_latent_moe.config import LatentMoEConfig, ParallelConfig
from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.formats.fp8 import BLOCK
from jax_latent_moe.low_rank import LowRank, base_of, map_leaf_axes
from jax_latent_moe.params import Params, check_config, param_axes, renamed
from jax_latent_moe.precision import Codes
from jax_latent_moe.shards import ONE_DEVICE, Shards

Body = Callable[..., tuple[Any, Any]]

CODES = "codes"
"""The part of the parameters of one call that holds the experts' `Codes`, by their names."""

REPLICATED_TOKENS = 256
"""Up to this many tokens that the devices do not divide are computed on every device; more are padded instead.

Below it, the router, the projections and the shared expert take the time to read their kernels, which each device reads
whole in any case. Replicated tokens need one all-reduce, and padded ones four collectives.
"""


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes in a text such as "data=2,expert=4", with the default axis names of `ParallelConfig`.

    Raises:
        ConfigError: the text has another form, an empty part, an unknown axis, or the same axis twice.
    """
    known, sizes = ParallelConfig().axes, {}
    for entry in text.split(",") if text else ():
        if not entry:
            raise ConfigError(f"--mesh {text!r} has an empty part: leave out a comma, so that each part is AXIS=SIZE.")
        axis, _, size = entry.partition("=")
        if axis not in known or axis in sizes or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise ConfigError(
                f"--mesh {text!r}: {entry!r} must be AXIS=SIZE, each of {', '.join(known)} at most once, such as "
                "data=2,expert=4."
            )
        sizes[axis] = int(size)
    return sizes


def axis_sizes(parallel: ParallelConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Devices along the data, fsdp, expert, tensor and sequence axes. It is 1 for an axis that the mesh lacks.

    Raises:
        InputError: an argument is of another type.
    """
    if not isinstance(parallel, ParallelConfig):
        raise InputError(f"parallel of type {type(parallel).__name__} must be a ParallelConfig, as in config.parallel.")
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise InputError(f"mesh of type {type(mesh).__name__} must be a mesh, such as jax.make_mesh makes.")
    return {axis: mesh.shape.get(axis, 1) for axis in (*parallel.axes, parallel.sequence_axis)}


def logical_axis_rules(
    parallel: ParallelConfig, mesh: Mesh | AbstractMesh, axis_names: Mapping[str, str | None] | None = None
) -> list[tuple[str, str | None]]:
    """The mesh axis of each logical axis of `param_axes`, in the form of Flax's rules.

    Args:
        parallel: gives the names of the mesh axes.
        mesh: the mesh. An axis that it lacks, or that has size 1, splits nothing.
        axis_names: other names for some logical axes, as in `param_axes`, such as `parallel.MAXTEXT_AXES`.

    Raises:
        InputError: axis_names renames an axis that no layer has, or gives one name to axes that are split differently.
    """
    sizes = axis_sizes(parallel, mesh)
    split = (
        ("expert", parallel.expert_axis),
        ("expert_intermediate", parallel.tensor_axis),
        ("shared_intermediate", parallel.tensor_axis),
        ("hidden", parallel.fsdp_axis),
        ("expert_latent", parallel.fsdp_axis),
    )
    named: dict[str, str | None] = {}
    for logical, mesh_axis in (*((name, axis if sizes[axis] > 1 else None) for name, axis in split), ("latent", None)):
        if (name := renamed(logical, axis_names)) is None:
            continue
        if named.setdefault(name, mesh_axis) != mesh_axis:
            raise InputError(
                f"axis_names give {name!r} to an axis that is split over {named[name]} and to {logical!r}, which is "
                f"split over {mesh_axis}: give them different names."
            )
    return list(named.items())


def param_specs(
    config: LatentMoEConfig, mesh: Mesh | AbstractMesh, params: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """How each parameter is split: experts over the expert axis, inner widths over tensor, the rest over fsdp.

    Args:
        config: the layer, with `parallel` set.
        mesh: the mesh. Its sizes must divide what they split.
        params: the parameters or their shapes. Only `ScaledArray` and `LowRank` leaves are read. Each gets a spec for
            each of its arrays.

    Raises:
        ConfigError: config.parallel is None, or an axis does not divide what it splits.
        InputError: config or mesh is of another type.
    """
    check_config(config)
    if config.parallel is None:
        raise ConfigError("parallel=None names no mesh axes: set parallel=ParallelConfig() in the layer's config.")
    check_divides(config, mesh)
    rules = {None: None, **dict(logical_axis_rules(config.parallel, mesh))}
    specs: dict[str, dict[str, Any]] = {
        part: {name: PartitionSpec(*(rules[axis] for axis in axes)) for name, axes in leaves.items()}
        for part, leaves in param_axes(config).items()
    }
    for part, leaves in (params or {}).items():
        for name, leaf in leaves.items():
            if part == CODES or not isinstance(leaf, ScaledArray | LowRank):
                continue
            specs[part][name] = map_leaf_axes(leaf, specs[part][name], PartitionSpec, stacked=part == "experts")
            codes = base_of(leaf)
            if isinstance(codes, ScaledArray):
                _check_blocks(f"{part}/{name}", codes, base_of(specs[part][name]).codes, mesh)
    return specs


def code_specs(config: LatentMoEConfig, mesh: Mesh | AbstractMesh, leading: int = 0) -> Codes:
    """How codes are split: as the weights are, but not over an fsdp axis that `cuts_blocks`.

    Args:
        config: the layer, with `parallel` set.
        mesh: the mesh.
        leading: number of axes before the experts' axis.

    Returns:
        one spec for all arrays of each `ScaledArray`, and for the weights' first rows.
    """
    specs, lead = param_specs(config, mesh)["experts"], (None,) * leading
    expert, latent, *_, inner = specs["w_in"]
    latent = None if cuts_blocks(config, mesh) else latent
    latent_last = PartitionSpec(*lead, expert, None, inner, latent)
    inner_last = PartitionSpec(*lead, expert, None, latent, inner)
    first_rows = (PartitionSpec(*lead, *specs[name]) for name in ("w_in", "w_out"))
    of_leaves: Any = latent_last, inner_last, inner_last, latent_last, *first_rows
    return Codes(*of_leaves)


def cuts_blocks(config: LatentMoEConfig, mesh: Mesh | AbstractMesh) -> bool:
    """Whether fsdp would cut a block of 128 x 128 of the experts' codes in two."""
    assert config.parallel is not None
    fsdp = axis_sizes(config.parallel, mesh)[config.parallel.fsdp_axis]
    return fsdp > 1 and config.latent_width % (fsdp * BLOCK) != 0


def token_spec(parallel: ParallelConfig, mesh: Mesh | AbstractMesh, ndim: int = 3) -> PartitionSpec:
    """How x is split: its first axis over data, fsdp and expert, in this order, and its sequences over sequence.

    Args:
        parallel: names the axes.
        mesh: axes that it lacks, or has with size 1, split nothing.
        ndim: axes of x. With 2, x is one sequence, which all of these axes split.
    """
    split = _token_axes(parallel, mesh, ndim)
    spec = [split.get(axis) for axis in range(max(split, default=-1) + 1)]
    return PartitionSpec(*spec)


def in_auto_mode(
    run: Callable[..., tuple[Any, Any]], params: Params, x: Float[Array, "*batch d"], by_token: Any, whole: Any
) -> tuple[Any, Any]:
    """Calls run(params, x, by_token, whole) with mesh axes of type Explicit left to XLA.

    The first results of run are split as the tokens are and have the sharding of x. The others are replicated. Explicit
    axes would need a rule for how sorts, ragged products and kernels split their operands, and there is none.
    """
    mesh = jax.typeof(x).sharding.mesh
    explicit = tuple(mesh.explicit_axes)
    if not explicit:
        return run(params, x, by_token, whole)
    spec = jax.typeof(x).sharding.spec
    ids = PartitionSpec(*spec[:-1], None)
    shardings = (PartitionSpec(*spec), ids, ids), PartitionSpec()
    in_auto: Callable = jax.sharding.auto_axes(run, axes=explicit, out_sharding=shardings)
    return in_auto(params, x, by_token, whole)


def over_mesh(
    body: Body, config: LatentMoEConfig, params: Params, x: Float[Array, "*batch d"], by_token: Any, whole: Any
) -> tuple[Any, Any]:
    """Runs body(shards, params, x, by_token, whole) on each device's part of the arguments.

    The mesh is the one of `jax.set_mesh`. Without a mesh, or on one device, this is one plain call of the body. If the
    devices do not divide the first axis of x, few tokens are replicated and many are padded.

    Args:
        body: returns arrays that are split as the tokens are, and arrays that are the same on all devices.
        config: the layer, with `parallel` set.
        params: as `init_params` makes them. The body gets its own experts and inner widths, and all other axes whole.
        x: [..., d], split as `token_spec` says.
        by_token: a NamedTuple of arrays whose leading axes are those of x, or None. Its `token_mask` is False for
            padding.
        whole: arrays that every device gets whole.

    Raises:
        ConfigError: an axis of the mesh does not divide what it splits, or is of type Manual.
    """
    parallel, mesh = config.parallel, jax.sharding.get_abstract_mesh()
    assert parallel is not None
    sizes = axis_sizes(parallel, mesh)
    if math.prod(sizes.values()) == 1:
        return body(ONE_DEVICE, params, x, by_token, whole)
    _check_axis_types(mesh, sizes)
    leading = x.shape[:-1]
    split = _token_axes(parallel, mesh, x.ndim)
    parts = [math.prod(sizes[name] for name in split.get(axis, ())) for axis in range(len(leading))]
    # An empty batch is padded too: XLA does not lower collectives of empty arrays.
    missing = [part if size == 0 else -size % part for size, part in zip(leading, parts, strict=True)]
    count = math.prod(leading)
    if not leading or (any(missing) and 0 < count <= REPLICATED_TOKENS):
        split = {}
    elif any(missing):
        x, by_token = _pad_tokens(missing, x, by_token)
    last = x.ndim - 2
    shards = Shards(
        batch_axes=split.get(0, ()) if last else (),
        sequence_axes=split.get(last, ()),
        sequence_length=x.shape[last] // math.prod(sizes[name] for name in split.get(last, ())) if leading else 1,
        expert_axis=parallel.expert_axis if sizes[parallel.expert_axis] > 1 else None,
        tensor_axis=parallel.tensor_axis if sizes[parallel.tensor_axis] > 1 else None,
    )
    specs = param_specs(config, mesh, params)
    if CODES in params:
        own = code_specs(config, mesh)._asdict()
        specs[CODES] = {
            name: jax.tree.map(lambda _, spec=own[name]: spec, leaf) for name, leaf in params[CODES].items()
        }

    def local(params, x, by_token, whole):
        return body(shards, _gather(params, specs, config), x, by_token, whole)

    everywhere = PartitionSpec()
    tokens = token_spec(parallel, mesh, x.ndim) if split else everywhere
    mapped = jax.shard_map(
        local,
        in_specs=(specs, tokens, tokens, everywhere),
        out_specs=(tokens, everywhere),
        axis_names={axis for axis in sizes if axis in mesh.shape},
        # Kernels do not say over which axes their outputs vary. The sums in Shards do not need the check.
        check_vma=False,
    )
    outputs, totals = mapped(params, x, by_token, whole)
    if x.shape[:-1] != leading:
        own = tuple(slice(size) for size in leading)
        outputs = jax.tree.map(lambda value: value[own], outputs)
    return outputs, totals


def _pad_tokens(missing, x, by_token):
    """The arguments with `missing` masked tokens behind the others along each axis."""
    if by_token.token_mask is None:
        by_token = by_token._replace(token_mask=jnp.ones(x.shape[:-1], bool))

    def pad(values):
        return jnp.pad(values, [(0, count) for count in missing] + [(0, 0)] * (values.ndim - len(missing)))

    return jax.tree.map(pad, (x, by_token))


def _token_axes(parallel, mesh, ndim) -> dict[int, tuple[str, ...]]:
    """The mesh axes that split each axis of x, of those that have more than one device."""
    sizes = axis_sizes(parallel, mesh)
    batch = tuple(axis for axis in (parallel.data_axis, parallel.fsdp_axis, parallel.expert_axis) if sizes[axis] > 1)
    sequence = (parallel.sequence_axis,) if sizes[parallel.sequence_axis] > 1 else ()
    split = {0: batch + sequence} if ndim == 2 else {0: batch, ndim - 2: sequence}
    return {axis: names for axis, names in split.items() if names}


def _gather(params: Params, specs, config: LatentMoEConfig) -> Params:
    """Gathers the kernels along all axes except those that split the work, which are the experts and inner widths."""
    parallel = config.parallel
    assert parallel is not None
    split_work = (parallel.expert_axis, parallel.tensor_axis)

    def whole(leaf, spec, gather, kept):
        for dimension, axis in enumerate(spec):
            if axis is not None and axis not in kept:
                leaf = gather(axis, dimension, leaf)
        return leaf

    def gathered(part, name, leaf):
        narrow = isinstance(leaf, jax.Array) and _read_narrow(config, part, leaf)
        gather = partial(_gather_in, config.dtype, leaf.dtype) if narrow else _gather_along
        kept = () if part == "router" else split_work
        return jax.tree.map(partial(whole, gather=gather, kept=kept), leaf, specs[part][name])

    return {part: {name: gathered(part, name, leaf) for name, leaf in params[part].items()} for part in params}


def _gather_along(axis, dimension, leaf):
    return jax.lax.all_gather(leaf, axis, axis=dimension, tiled=True)


def _read_narrow(config, part, leaf) -> bool:
    """Whether the layer reads this array only in config.dtype, which has fewer bytes.

    FP8 codes are rounded once, from the dtype of the parameters, so `precision` reads whole experts.
    """
    reads = part in ("down_proj", "up_proj", "shared") or (part == "experts" and config.precision is None)
    return reads and jnp.dtype(config.dtype).itemsize < leaf.dtype.itemsize


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather_in(narrow, wide, axis, dimension, leaf):
    """An all-gather in one dtype whose gradient is a reduce-scatter in another, that of the leaf."""
    del wide
    return _gather_along(axis, dimension, leaf.astype(narrow))


def _gather_in_fwd(narrow, wide, axis, dimension, leaf):
    return _gather_in(narrow, wide, axis, dimension, leaf), None


def _gather_in_bwd(narrow, wide, axis, dimension, _, cotangent):
    del narrow
    return (jax.lax.psum_scatter(cotangent.astype(wide), axis, scatter_dimension=dimension, tiled=True),)


_gather_in.defvjp(_gather_in_fwd, _gather_in_bwd)


def check_divides(config: LatentMoEConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that cannot split the layer into equal parts.

    Raises:
        ConfigError: an axis of the mesh does not divide what it splits.
    """
    assert config.parallel is not None
    _, fsdp, expert, tensor = config.parallel.axes
    sizes = axis_sizes(config.parallel, mesh)
    for name, width, axis in (
        ("num_experts", config.num_experts, expert),
        ("the length of parallel.physical_to_logical", config.num_physical_experts, expert),
        ("expert_intermediate_size", config.expert_intermediate_size, tensor),
        ("shared_expert_intermediate_size", config.shared_expert_intermediate_size, tensor),
        ("hidden_size", config.hidden_size, fsdp),
        ("latent_size", config.latent_width, fsdp),
    ):
        if width % sizes[axis]:
            raise ConfigError(f"{name}={width} must be a multiple of the mesh's {axis}={sizes[axis]}, which splits it.")


def _check_blocks(name, leaf, spec, mesh):
    """Refuses a mesh axis that would cut a block of a quantised weight, or codes that are stored together, in two."""
    format = FORMATS[leaf.format]
    along_k, along_n = (-1, "inputs", format.packing, format.group), (-2, "outputs", 1, 1)
    for (dimension, what, packing, group), block in zip((along_k, along_n), format.block, strict=True):
        axis = spec[dimension]
        blocks = max(scale.shape[dimension] for scale in jax.tree.leaves(leaf.scales))
        multiple = math.lcm(packing, group, (block or 1) if blocks > 1 else 1)
        size = leaf.codes.shape[dimension] * packing
        if axis is not None and size % (multiple * mesh.shape[axis]):
            raise ConfigError(
                f"{name} in {leaf.format} has {size} {what} in groups of {multiple}, which {axis}={mesh.shape[axis]} "
                "would cut: split the experts instead, or choose a format with smaller groups, such as int8."
            )


def _check_axis_types(mesh, sizes):
    for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if axis in sizes and kind == AxisType.Explicit:
            raise ConfigError(
                f"mesh axis '{axis}' is of type Explicit, and x is not placed on the mesh: place it and the params by "
                "jax.device_put, for x with NamedSharding(mesh, token_spec(config.parallel, mesh, x.ndim))."
            )
        if axis in sizes and kind != AxisType.Auto:
            raise ConfigError(
                f"mesh axis '{axis}' is of type {kind.name}, and the layer can only map over axes of type Auto: "
                "leave parallel=None inside of a shard_map."
            )
