"""Imports layers from a checkpoint: each tensor goes through a small buffer into the stacked parameters."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int

from jax_latent_moe.config import COMPUTE_DTYPES
from jax_latent_moe.errors import CheckpointError, InputError
from jax_latent_moe.hf.checkpoint import Checkpoint, LayerPlan, Stored, plan_layer
from jax_latent_moe.hf.encodings import PLAIN
from jax_latent_moe.hf.names import Block, Layer
from jax_latent_moe.hf.placing import place
from jax_latent_moe.hf.quantised import quantised_leaves, read_leaf
from jax_latent_moe.hf.tensor_file import DTYPES, opened, read_bytes, read_part, read_tensor
from jax_latent_moe.params import Params, param_shapes

CHUNK = 256 * 1024
"""Bytes of a tensor read at once. They stay in a core's cache until they are transposed."""
THREADS = 16
"""The most threads that read matrices of codes, because each of them holds two or three whole matrices."""

Report = Callable[[str, int, int], None]
Files = Mapping[pathlib.Path, BinaryIO]


def import_layer(
    checkpoint: Checkpoint,
    layer: Layer,
    *,
    dtype: str | None = None,
    keep_quantized: bool = False,
    sharding: Sharding | Mapping[str, Mapping[str, Any]] | None = None,
    report: Report | None = None,
) -> Params:
    """Imports one layer's parameters, each read straight into its shards.

    The layer never exists twice in memory. Each parameter is assembled in host memory from pieces of 256 KB, or from
    whole matrices if it is quantised. It is moved to its devices before the next one is read. A CPU device takes over
    the host memory without a copy. Experts go to other devices in parts, so that the host holds few of them at once.

    Args:
        checkpoint: from `open_checkpoint`.
        layer: one of `checkpoint.layers`.
        dtype: dtype of the parameters. None keeps the stored dtype, or takes the model's if a parameter is quantised.
            The correction bias is always float32.
        keep_quantized: whether experts that are stored quantised become `ScaledArray`s of the stored codes. Otherwise
            they are decoded. Projections and shared experts are always decoded.
        sharding: one for all parameters, or one per leaf of `param_shapes`. None places them on JAX's default device. A
            quantised weight may have one for the dense weight, or a `ScaledArray` of shardings.
        report: called from time to time with the parameter's name, its bytes assembled so far, and all its bytes.

    Raises:
        CheckpointError: tensors are missing or unexpected, or have a wrong shape or dtype (the error lists them all); a
            file is truncated; a quantised weight is not finite; or no format holds an expert's weights as they are
            stored, with keep_quantized.
        InputError: dtype is unknown, sharding lacks a parameter, or float64 is needed and JAX's 64-bit types are off.
    """
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise InputError(f"dtype={dtype!r} is unknown: use one of {', '.join(COMPUTE_DTYPES)}, or None.")
    plan = plan_layer(checkpoint, layer)
    float64 = dtype == "float64" or (dtype is None and np.dtype("float64") in plan.dtypes.values())
    if float64 and not jax.config.jax_enable_x64:
        raise InputError(
            "dtype float64 needs JAX's 64-bit types, and they are off: call jax.config.update('jax_enable_x64', True), "
            "or pass dtype='float32'."
        )
    shapes = param_shapes(plan.config)
    if isinstance(sharding, Mapping):
        _check_shardings(sharding, shapes)
    quantised = quantised_leaves(plan, f"{checkpoint.folder.path}, layer {layer}") if keep_quantized else {}

    def assembled(path, leaf, files, pool) -> Any:
        where = sharding[path[0]][path[1]] if isinstance(sharding, Mapping) else sharding
        if path in quantised:
            done = _reporter(report, "/".join(path), quantised[path].shapes.nbytes)
            return read_leaf(quantised[path], plan, files, pool, where, done)
        wanted = plan.dtypes[path] if dtype is None or path[1] == "bias" else np.dtype(dtype)
        blocks = [block for block in plan.blocks if block.path == path]
        done = _reporter(report, "/".join(path), leaf.size * wanted.itemsize)

        def fill(array, index):
            _fill(array, index, leaf.shape, blocks, plan, files, pool, done)

        return place(leaf.shape, wanted, where, fill, experts=path[0] == "experts")

    params: dict[str, dict[str, Any]] = {part: {} for part in shapes}
    threads = min(os.cpu_count() or 1, THREADS) if quantised else os.cpu_count()
    with _open_files(plan) as files, ThreadPoolExecutor(threads) as pool:
        # The experts come last: what decodes a matrix of another part needs several times its bytes for a moment.
        for part in sorted(shapes, key=lambda part: part == "experts"):
            for name, leaf in shapes[part].items():
                params[part][name] = assembled((part, name), leaf, files, pool)
    return params


def import_token_experts(checkpoint: Checkpoint, layer: Layer) -> Int[Array, "vocabulary k"]:
    """The table of a layer whose choice is given (DeepSeek-V4's hash layers): the experts of each token id.

    The table is not a parameter. Give the layer its rows: `latent_moe(params, x, config, expert_ids=table[token_ids])`.

    Args:
        checkpoint: from `open_checkpoint`.
        layer: one of `checkpoint.layers`.

    Returns:
        [vocabulary, k] int32.

    Raises:
        CheckpointError: the layer has no such table, or an id in it is not an expert.
    """
    plan = plan_layer(checkpoint, layer)
    info = plan.token_experts
    if info is None:
        raise CheckpointError(checkpoint.folder.path, [f"layer {layer} chooses its experts itself: it has no table."])
    with opened(info.file) as file:
        table = read_tensor(file, info)
    if table.size and not 0 <= table.min() <= table.max() < plan.config.num_experts:
        raise CheckpointError(
            info.file,
            [
                f"the table of layer {layer} names experts {table.min()} to {table.max()}; there are 0 to "
                f"{plan.config.num_experts - 1}."
            ],
        )
    return jnp.asarray(table.astype(np.int32))


def import_layers(
    checkpoint: Checkpoint, layers: Sequence[Layer] | None = None, **options
) -> Iterator[tuple[Layer, Params]]:
    """Yields (layer, parameters) from `import_layer`, one layer at a time; all layers by default."""
    for layer in checkpoint.layers if layers is None else layers:
        yield layer, import_layer(checkpoint, layer, **options)


def _check_shardings(sharding, shapes):
    lacking = [f"{part}/{name}" for part in shapes for name in shapes[part] if name not in sharding.get(part, {})]
    if lacking:
        raise InputError(f"sharding has none for {', '.join(lacking)}: give one for each leaf of param_shapes(config).")


def _reporter(report: Report | None, name: str, total: int) -> Callable[[int], None]:
    """Adds up bytes and reports the sum."""
    done = 0

    def add(nbytes):
        nonlocal done
        done += nbytes
        if report is not None:
            report(name, done, total)

    return add


@contextlib.contextmanager
def _open_files(plan: LayerPlan) -> Iterator[Files]:
    paths = {info.file for stored in plan.tensors.values() for info in stored.parts.values()}
    with contextlib.ExitStack() as stack:
        yield {path: stack.enter_context(opened(path)) for path in paths}


def _fill(array, index, shape, blocks, plan, files, pool, report):
    """Reads the part `index` of a parameter into array, with its blocks in parallel; report gets their bytes."""
    index = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    jobs = []
    for block in blocks:
        target, ranges = array, index
        if block.expert is not None:
            if block.expert not in ranges[0]:
                continue
            target, ranges = target[ranges[0].index(block.expert)], ranges[1:]
        if block.half is not None:
            if block.half not in ranges[1]:
                continue
            target, ranges = target[:, ranges[1].index(block.half)], [ranges[0], ranges[2]]
        jobs.append((block, target, ranges))

    def fill(job):
        block, target, ranges = job
        return _fill_block(block, target, ranges, plan.tensors[block.tensor], files)

    try:
        for nbytes in pool.map(fill, jobs):
            report(nbytes)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _fill_block(block: Block, target: np.ndarray, ranges: Sequence[range], stored: Stored, files: Files) -> int:
    """Reads the ranges of one block into target: [n], [in, out], or [in, 2, out] if the block's layout is "pairs".

    Returns the number of bytes in target.
    """
    if target.ndim == 1:
        info = stored.parts["weight"]
        target[...] = read_tensor(files[info.file], info)[ranges[0].start : ranges[0].stop]
    elif stored.encoding is PLAIN:
        _fill_plain(block, target, ranges, stored.parts["weight"], files)
    elif block.layout != "transposed":
        # The codes of an expert are stored [out, in], although the tensor of its values would be [in, out].
        matrix = decode_stored(block.tensor, stored, files, block.expert)
        part = _of_pairs(matrix.T, block)[tuple(slice(part.start, part.stop) for part in ranges)]
        np.copyto(target, part, casting="unsafe")
    else:
        columns, rows = (slice(part.start, part.stop) for part in ranges)
        _transpose_into(target, decode_stored(block.tensor, stored, files)[block.first_row :][rows, columns])
    return target.nbytes


def _of_pairs(matrix: np.ndarray, block: Block) -> np.ndarray:
    """The rows [n, 2 m] as [n, 2, m] if gate and up alternate in them, else as they are."""
    return matrix.reshape(len(matrix), -1, 2).swapaxes(1, 2) if block.layout == "pairs" else matrix


def _fill_plain(block, target, ranges, info, files):
    if block.layout != "transposed":
        return _fill_rows(block, target, ranges, info, files)
    columns, rows = ranges
    width = info.shape[-1]
    dtype = DTYPES[info.dtype]
    # A multiple of 32 rows: 32 of bfloat16 are a whole cache line of target.
    step = max(1, CHUNK // max(1, width * dtype.itemsize * 32)) * 32
    buffer = np.empty((step, width), dtype)
    for first in range(rows.start, rows.stop, step):
        chunk = buffer[: min(step, rows.stop - first)]
        read_bytes(files[info.file], info, (block.first_row + first) * width * dtype.itemsize, chunk)
        out = target[:, first - rows.start : first - rows.start + len(chunk)]
        _transpose_into(out, chunk[:, columns.start : columns.stop])


def _fill_rows(block, target, ranges, info, files):
    """Reads rows of the tensor into rows of target."""
    rows, *rest = ranges
    columns = tuple(slice(part.start, part.stop) for part in rest)
    width, dtype = info.shape[-1], DTYPES[info.dtype]
    step = max(1, CHUNK // max(1, width * dtype.itemsize))
    buffer = np.empty((step, width), dtype)
    for first in range(rows.start, rows.stop, step):
        chunk = buffer[: min(step, rows.stop - first)]
        read_bytes(files[info.file], info, (block.first_row + first) * width * dtype.itemsize, chunk)
        out = target[first - rows.start : first - rows.start + len(chunk)]
        np.copyto(out, _of_pairs(chunk, block)[:, *columns], casting="unsafe")


def _transpose_into(target: np.ndarray, matrix: np.ndarray):
    """Copies matrix.T into target.

    NumPy transposes one element at a time. Four rows of a two-byte type are therefore packed first into one row of
    eight-byte elements, which halves the time.
    """
    if target.dtype == matrix.dtype:  # NumPy copies integers faster than bfloat16
        bits = np.dtype(f"u{target.itemsize}")
        target, matrix = target.view(bits), matrix.view(bits)
        if target.itemsize == 2 and matrix.shape[0] % 4 == 0 and target.strides[1] == 2 and sys.byteorder == "little":
            target, matrix = target.view(np.uint64), _pack_rows(_pack_rows(matrix))
    np.copyto(target, matrix.T, casting="unsafe")


def _pack_rows(matrix: np.ndarray) -> np.ndarray:
    """Packs rows 2 i and 2 i + 1 of unsigned integers into row i of integers twice as wide, the first low."""
    packed = matrix[1::2].astype(f"u{2 * matrix.itemsize}")
    packed <<= 8 * matrix.itemsize
    packed |= matrix[::2]
    return packed


def decode_stored(tensor: str, stored: Stored, files: Files, expert: int | None = None) -> np.ndarray:
    """A quantised matrix [out, in] in float32, from a tensor or from one expert's part of it.

    Raises:
        CheckpointError: it is not finite, or its file is truncated.
    """
    parts = {
        name: read_part(files[stored.parts[name].file], stored.parts[name], expert) for name in stored.encoding.dtypes
    }
    decode = stored.encoding.decode
    assert decode is not None, "plain tensors are not decoded"
    try:
        return decode(parts)
    except ValueError as error:
        file = next(iter(stored.parts.values())).file
        raise CheckpointError(file, [f"{tensor} ({stored.encoding.name}): {error}."]) from error
