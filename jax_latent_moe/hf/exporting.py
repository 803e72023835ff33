"""Layers back into safetensors files: bit for bit where they were imported as stored."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf.checkpoint import Checkpoint, LayerPlan, plan_layer
from jax_latent_moe.hf.folder import write_index
from jax_latent_moe.hf.importing import CHUNK
from jax_latent_moe.hf.names import Layer, Names, Slot, layer_slots, tensor_shapes
from jax_latent_moe.hf.tensor_file import DTYPES, NAMES, TensorInfo, create, opened, read_bytes, write_bytes
from jax_latent_moe.params import Params, check_params


def replace_layers(
    checkpoint: Checkpoint, layers: Iterable[tuple[Layer, Params]], path: str | os.PathLike[str]
) -> None:
    """Writes a copy of the whole checkpoint to path, these layers in it replaced.

    Files, names and dtypes stay as they are: parameters that were imported as stored and not changed give the same
    files again, and the copy loads wherever the original did. Other dtypes are rounded to the stored one.

    Args:
        checkpoint: the original.
        layers: one after the other, so that they need not be in memory together.
        path: a folder that does not exist yet; it appears when it is complete.

    Raises:
        CheckpointError: path exists, or a layer of the original is quantised (`write_layers` writes it unquantised).
        InputError: parameters do not fit their layer.
    """
    with _complete(path) as partial:
        shutil.copytree(checkpoint.folder.path, partial)
        for layer, params in layers:
            plan = plan_layer(checkpoint, layer)
            if plan.quantised:
                how = " and ".join(plan.quantised)
                raise CheckpointError(
                    checkpoint.folder.path, [f"layer {layer} is stored as {how}: write_layers writes it unquantised."]
                )
            check_params(params, plan.config)
            _write_slots(plan.slots, params, {t: stored.parts["weight"] for t, stored in plan.tensors.items()}, partial)


def write_layers(
    path: str | os.PathLike[str],
    layers: Iterable[tuple[Layer, Params]],
    configs: dict[Layer, LatentMoEConfig],
    names: Names,
) -> None:
    """Writes MoE layers alone, each to a file of its own, and an index over them, under the names of any system.

    Args:
        path: a folder that does not exist yet; it appears when it is complete. Add config.json to read it again.
        layers: one after the other, so that they need not be in memory together.
        configs: the configuration of each layer.
        names: of the tensors, such as `MEGATRON` or `Checkpoint.names`.

    Raises:
        CheckpointError: path exists, or the names have none for a parameter of the layer.
        InputError: parameters do not fit their layer.
    """
    with _complete(path) as partial:
        partial.mkdir(parents=True)
        file_of, total = {}, 0
        for layer, params in layers:
            check_params(params, configs[layer])
            try:
                slots = layer_slots(configs[layer], names)
            except ValueError as error:
                raise CheckpointError(path, [f"layer {layer}: {error}"]) from error
            prefix, file = names.prefix(layer, ()), f"moe-layer-{layer}.safetensors"
            dtypes = {slot.tensor: NAMES[np.dtype(params[slot.path[0]][slot.path[1]].dtype)] for slot in slots}
            shapes = tensor_shapes(configs[layer], slots)
            infos = create(partial / file, {prefix + t: (dtypes[t], shape) for t, shape in shapes.items()})
            _write_slots(slots, params, {name.removeprefix(prefix): info for name, info in infos.items()}, partial)
            file_of |= dict.fromkeys(infos, file)
            total += sum(info.nbytes for info in infos.values())
        write_index(partial, file_of, total)


def differing_tensors(plan: LayerPlan, params: Params) -> list[str]:
    """Names of the tensors whose bytes differ from what these parameters would be written as."""
    differing = set()
    infos = {tensor: stored.parts["weight"] for tensor, stored in plan.tensors.items()}
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(opened(path)) for path in {info.file for info in infos.values()}}
        for slot, offset, data in _chunks(plan.slots, params, infos):
            stored = np.empty_like(data)
            read_bytes(files[infos[slot.tensor].file], infos[slot.tensor], offset, stored)
            if data.tobytes() != stored.tobytes():
                differing.add(slot.tensor)
    return sorted(differing)


@contextlib.contextmanager
def _complete(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes `path` if all goes well and is removed if not."""
    path = pathlib.Path(path)
    if path.exists():
        raise CheckpointError(path, ["it exists already: name a new folder."])
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_slots(slots: Iterable[Slot], params: Params, infos: dict[str, TensorInfo], folder: pathlib.Path):
    with contextlib.ExitStack() as stack:
        names = {info.file.name for info in infos.values()}
        files = {name: stack.enter_context((folder / name).open("r+b", buffering=0)) for name in names}
        for slot, offset, data in _chunks(slots, params, infos):
            info = infos[slot.tensor]
            write_bytes(files[info.file.name], info, offset, data)


def _chunks(slots, params, infos) -> Iterator[tuple[Slot, int, np.ndarray]]:
    """(slot, offset in its tensor, data) in the tensor's dtype and order, a small piece at a time."""
    for slot in slots:
        leaf = params[slot.path[0]][slot.path[1]]
        block = np.asarray(leaf if slot.expert is None else leaf[slot.expert])  # an expert at a time to the host
        dtype = DTYPES[infos[slot.tensor].dtype]
        if block.ndim == 1:
            yield slot, 0, block.astype(dtype)
            continue
        if slot.half is not None:
            block = block[:, slot.half]
        width, rows = block.shape
        step = max(1, CHUNK // max(1, width * dtype.itemsize))
        for first in range(0, rows, step):
            offset = (slot.first_row + first) * width * dtype.itemsize
            yield slot, offset, np.ascontiguousarray(block[:, first : first + step].T.astype(dtype))
