"""Experts kept as they are stored: the bytes of codes and scales, from the files to a `ScaledArray` and back.

Stored matrices are [out, in] and so are codes, so nothing is transposed. Codes of four bits change their order along K
(`formats.plain_packing`). All other bytes are copied.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.formats import FORMATS, ScaledArray, fp4, map_axes
from jax_latent_moe.formats.packing import pack_plain_e2m1
from jax_latent_moe.formats.plain_packing import GROUP_BYTES, from_plain, to_plain
from jax_latent_moe.hf.checkpoint import LayerPlan, Path, Stored
from jax_latent_moe.hf.encodings import (
    FP8,
    FP8_TILES,
    FP8_TILES_SCALE,
    MXFP4,
    MXFP4_BLOCKS,
    MXFP4_SCALE,
    NVFP4_MODELOPT,
    PLAIN,
    check_values,
)
from jax_latent_moe.hf.names import Block
from jax_latent_moe.hf.placing import OnDevice, place
from jax_latent_moe.hf.tensor_file import DTYPES, TensorInfo, read_part
from jax_latent_moe.params import param_shapes

_ONE_NUMBER = ((), (1,))
E2M1 = tuple(format.name for format in fp4.FORMATS)
"""The formats whose codes the files hold in the plain order."""


class Kept(NamedTuple):
    """How a stored matrix is held: the format, and the suffix of the tensor of its codes and of each scale."""

    format: str
    codes: str
    scales: tuple[tuple[str, str], ...]


class Leaf(NamedTuple):
    """A quantised parameter before it is read.

    Attributes:
        kept: how each of its matrices is held.
        shapes: a `ScaledArray` of shapes and dtypes.
        blocks: its matrices, by (expert, matrix) as on the first two axes of codes.
    """

    kept: Kept
    shapes: ScaledArray
    blocks: Mapping[tuple[int, int], Block]


def kept_as(stored: Stored) -> Kept | None:
    """How a stored matrix is held without decoding it; None if no format holds it."""
    unused = (("input", "input_scale"),) if "input_scale" in stored.parts else ()
    if stored.encoding is MXFP4:
        return Kept("mxfp4", "weight_packed", (("block", "weight_scale"),))
    if stored.encoding is MXFP4_SCALE:
        return Kept("mxfp4", "weight", (("block", "scale"),))
    if stored.encoding is MXFP4_BLOCKS:
        return Kept("mxfp4", "blocks", (("block", "scales"),))
    if stored.encoding is NVFP4_MODELOPT:
        return Kept("nvfp4", "weight", (("block", "weight_scale"), ("tensor", "weight_scale_2"), *unused))
    if stored.encoding is FP8_TILES:
        return Kept("fp8_block", "weight", (("block", "weight_scale_inv"),))
    if stored.encoding is FP8_TILES_SCALE:
        return Kept("fp8_block", "weight", (("block", "scale"),))
    if stored.encoding is FP8:
        name = "tensor" if stored.parts["weight_scale"].shape in _ONE_NUMBER else "channel"
        return Kept(f"fp8_{name}", "weight", ((name, "weight_scale"), *unused))
    return None


def quantised_leaves(plan: LayerPlan, where: object) -> dict[Path, Leaf]:
    """The experts' parameters that the plan's tensors hold quantised, as they are to be read.

    Args:
        plan: of the layer.
        where: what the error names.

    Raises:
        CheckpointError: a parameter's matrices are stored in several ways, or in a way that no format holds.
    """
    leaves, found = {}, []
    for name in ("w_in", "w_out"):
        shape = param_shapes(plan.config)["experts"][name]
        path = ("experts", name)
        blocks = [block for block in plan.blocks if block.path == path]
        stored = [plan.tensors[block.tensor] for block in blocks]
        if all(one.encoding is PLAIN for one in stored):
            continue
        ways = {_signature(one) for one in stored}
        kept = kept_as(stored[0])
        if kept is None or len(ways) > 1:
            listed = " and ".join(sorted({one.encoding.name for one in stored}))
            why = "no format holds it" if len(ways) == 1 else "not all of its matrices have the same tensors and dtypes"
            found.append(f"experts/{name} is stored as {listed}, and {why}: keep_quantized=False decodes it.")
            continue
        experts, k, n = shape.shape[0], shape.shape[1], shape.shape[-1]
        parts, format = 2 if len(shape.shape) == 4 else 1, FORMATS[kept.format]
        along_k, along_n = format.blocks(k, n)
        last_axes = {"block": (along_n, along_k), "channel": (n, 1)}
        scales = {}
        for scale, suffix in kept.scales:
            info = stored[0].parts[suffix]
            if scale == "input" and info.shape not in _ONE_NUMBER:
                found.append(f"{blocks[0].tensor}: {suffix} of shape {list(info.shape)} is not one number.")
            scales[scale] = jax.ShapeDtypeStruct((experts, parts, *last_axes.get(scale, (1, 1))), _held(info))
        codes: Any = jax.ShapeDtypeStruct((experts, parts, n, k // format.packing), np.uint8)
        by_place = {(block.expert or 0, part): block for block in blocks for part in _places(block)}
        leaves[path] = Leaf(kept, ScaledArray(codes, scales, kept.format), by_place)
    if found:
        raise CheckpointError(where, found)
    return leaves


def can_keep(plan: LayerPlan) -> bool:
    """Whether the formats can hold all experts of the layer as they are stored."""
    try:
        quantised_leaves(plan, "")
    except CheckpointError:
        return False
    return True


def _signature(stored: Stored) -> tuple:
    """The properties that all matrices of one parameter must share, besides their shapes."""
    parts = {suffix: (info.dtype, info.shape) for suffix, info in stored.parts.items()}
    return stored.encoding.name, tuple(sorted(parts.items()))


def _places(block: Block) -> tuple[int, ...]:
    """The matrices, on the second axis of codes, that a block holds: both if gate and up rows alternate."""
    return (0, 1) if block.layout == "pairs" else (block.half or 0,)


def tensor_of(block: Block, suffix: str) -> str:
    """Name of the tensor with this suffix, within the layer."""
    return f"{block.tensor}_{suffix}" if block.layout != "transposed" else block.tensor.removesuffix("weight") + suffix


def _held(info: TensorInfo) -> np.dtype:
    """Bytes for codes and scales of 8 bits, so that JAX gives them no gradient; other scales keep their dtype."""
    dtype = DTYPES[info.dtype]
    return np.dtype(np.uint8) if dtype.itemsize == 1 else dtype


def read_leaf(
    leaf: Leaf, plan: LayerPlan, files: Mapping, pool, sharding: Any, report: Callable[[int], None]
) -> ScaledArray:
    """Reads a parameter as it is stored, each matrix straight into its place.

    Args:
        leaf: of `quantised_leaves`.
        plan: of the layer.
        files: the open files by path.
        pool: runs the reading.
        sharding: None, one sharding for the parameter, or a `ScaledArray` of shardings.
        report: called with the number of bytes read.

    Raises:
        CheckpointError: a scale or code is not finite, or a file is truncated.
    """
    shardings = _shardings(leaf.shapes, sharding)
    suffix_of_codes: Any = leaf.kept.codes
    suffixes = ScaledArray(suffix_of_codes, dict(leaf.kept.scales), leaf.kept.format)

    def array_of(suffix, struct, where):
        plain = suffix == leaf.kept.codes and leaf.kept.format in E2M1

        def read(array, index, *, converts=plain):
            ranges = [range(*part.indices(size)) for part, size in zip(index, struct.shape, strict=True)]
            jobs = [(e, p) for e in ranges[0] for p in ranges[1]]

            def fill(job):
                block = leaf.blocks[job]
                values = _read_checked(block, plan.tensors[block.tensor], suffix, files)
                if block.layout == "pairs":
                    values = values.reshape(-1, 2, values[0].size)[:, job[1]]
                values = values.reshape(struct.shape[2:])
                rows, columns = index[2:]
                matrix = from_plain(values[rows], columns) if converts else values[rows, columns]
                array[ranges[0].index(job[0]), ranges[1].index(job[1])] = matrix.view(array.dtype)
                return matrix.nbytes

            for nbytes in pool.map(fill, jobs):
                report(nbytes)

        on_device = OnDevice(functools.partial(read, converts=False), pack_plain_e2m1, GROUP_BYTES) if plain else None
        return place(struct.shape, struct.dtype, where, read, experts=True, on_device=on_device)

    return jax.tree.map(array_of, suffixes, leaf.shapes, shardings)


def _read_checked(block: Block, stored: Stored, suffix: str, files: Mapping) -> np.ndarray:
    info = stored.parts[suffix]
    values = read_part(files[info.file], info, None if block.layout == "transposed" else block.expert)
    try:
        check_values(stored.encoding, suffix, values)
    except ValueError as error:
        raise CheckpointError(info.file, [f"{block.tensor} ({stored.encoding.name}): {error}."]) from error
    return values


def _shardings(shapes: ScaledArray, sharding: Any) -> ScaledArray:
    """The shardings of codes and scales, also from the sharding of a dense parameter [E, in, (2,) out]."""
    if isinstance(sharding, ScaledArray):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, shapes)
    axes = 4 if shapes.codes.shape[1] == 2 else 3
    spec = (*sharding.spec, *[None] * (axes - len(sharding.spec)))
    return map_axes(shapes, spec, lambda *split: NamedSharding(sharding.mesh, PartitionSpec(*split)))


def stored_bytes(leaf: ScaledArray, block: Block, stored: Stored) -> Iterator[tuple[str, TensorInfo, int, np.ndarray]]:
    """(suffix, place in the file, offset, bytes) of one expert's matrix in each of its tensors.

    Raises:
        ValueError: the parameter is in another format, or its scales have another type, than what is stored.
    """
    kept, expert, whole = kept_as(stored), block.expert or 0, block.layout == "transposed"
    names = {} if kept is None else dict(kept.scales)
    if kept is None or leaf.format != kept.format or set(leaf.scales) != set(names):
        name = "/".join(block.path)
        raise ValueError(f"{name} is in format {leaf.format}, and the file holds {stored.encoding.name}")
    for suffix, array in ((kept.codes, leaf.codes), *((names[name], scale) for name, scale in leaf.scales.items())):
        info, matrices = stored.parts[suffix], np.asarray(array[expert])
        values = matrices.swapaxes(0, 1) if block.layout == "pairs" else matrices[block.half or 0]
        nbytes = info.nbytes if whole else info.nbytes // info.shape[0]
        if values.nbytes != nbytes or values.dtype != _held(info):
            raise ValueError(f"{suffix} of {'/'.join(block.path)} is {values.dtype}, and the file holds {info.dtype}")
        values = to_plain(values) if suffix == kept.codes and kept.format in E2M1 else np.ascontiguousarray(values)
        yield suffix, info, 0 if whole else expert * nbytes, values
