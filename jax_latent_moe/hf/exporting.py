"""Layers back into safetensors files: bit for bit where they were imported as stored."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf.checkpoint import Checkpoint, LayerPlan, plan_layer
from jax_latent_moe.hf.folder import write_index
from jax_latent_moe.hf.importing import CHUNK
from jax_latent_moe.hf.names import Layer, Names, Slot, layer_slots, tensor_shapes
from jax_latent_moe.hf.outputs import copy_folder, new_folder
from jax_latent_moe.hf.tensor_file import DTYPES, NAMES, TensorInfo, create, opened, read_bytes, write_bytes
from jax_latent_moe.params import Params, check_params

_OF_QUANTISATION = ("quantization_config", "compression_config")


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
        CheckpointError: path exists, lies in the original or cannot be written; a layer comes twice, is no layer of the
            original, or is quantised there (`write_layers` writes it unquantised).
        InputError: parameters do not fit their layer.
    """
    with new_folder(path, checkpoint.folder.path) as partial:
        copy_folder(checkpoint.folder.path, partial)
        for layer, params in _each_once(path, layers):
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
    configs: Mapping[Layer, LatentMoEConfig],
    names: Names,
    *,
    config_json: Mapping[str, Any] | None = None,
) -> None:
    """Writes MoE layers alone, each to a file of its own, and an index over them, under the names of any system.

    Args:
        path: a folder that does not exist yet; it appears when it is complete.
        layers: one after the other, so that they need not be in memory together.
        configs: the configuration of each layer.
        names: of the tensors, such as `MEGATRON` or `Checkpoint.names`.
        config_json: values of a config.json to write beside them, so that `open_checkpoint` reads the folder. Its dtype
            becomes that of the parameters, and what it says of quantisation is left out.

    Raises:
        CheckpointError: path exists or cannot be written, a layer is not in configs or comes twice, the names have none
            for a parameter of it, or config_json cannot hold the parameters' dtypes.
        InputError: parameters do not fit their layer.
    """
    with new_folder(path) as partial:
        file_of, total, dtypes_used = {}, 0, set()
        for layer, params in _each_once(path, layers):
            if layer not in tuple(configs):
                known = ", ".join(map(str, configs))
                raise CheckpointError(path, [f"layer {layer!r} has no configuration; these have one: {known}."])
            check_params(params, configs[layer])
            try:
                slots, prefix = layer_slots(configs[layer], names), names.prefix(layer, ())
                dtypes = {slot.tensor: _format_name(params, slot) for slot in slots}
            except ValueError as error:
                raise CheckpointError(path, [f"layer {layer}: {error}"]) from error
            file = f"moe-layer-{layer}.safetensors"
            shapes = tensor_shapes(configs[layer], slots)
            infos = create(partial / file, {prefix + t: (dtypes[t], shape) for t, shape in shapes.items()})
            _write_slots(slots, params, {name.removeprefix(prefix): info for name, info in infos.items()}, partial)
            file_of |= dict.fromkeys(infos, file)
            total += sum(info.nbytes for info in infos.values())
            dtypes_used |= {dtypes[slot.tensor] for slot in slots if slot.path != ("router", "bias")}
        write_index(partial, file_of, total)
        if config_json is not None:
            text = json.dumps(_described(path, config_json, dtypes_used), indent=2)
            (partial / "config.json").write_text(text + "\n")


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


def _each_once(path, layers: Iterable[tuple[Layer, Params]]) -> Iterator[tuple[Layer, Params]]:
    seen = set()
    for layer, params in layers:
        if layer in seen:
            raise CheckpointError(path, [f"layer {layer} comes twice: give each layer once."])
        seen.add(layer)
        yield layer, params


def _format_name(params: Params, slot: Slot) -> str:
    """The parameter's dtype as safetensors calls it."""
    part, leaf = slot.path
    dtype = np.dtype(params[part][leaf].dtype)
    if dtype not in NAMES:
        raise ValueError(f"{part}/{leaf} is {dtype}, which safetensors files do not have: convert it to bfloat16.")
    return NAMES[dtype]


def _described(path, values: Mapping[str, Any], dtypes: set[str]) -> dict[str, Any]:
    """The values of a config.json with the dtype that its tensors have now; float32 fits beside any other."""
    models = sorted(dtypes - {"F32"}) or sorted(dtypes)
    if len(models) > 1:
        raise CheckpointError(
            path, [f"parameters of {' and '.join(models)}: config.json names one; convert them to it."]
        )
    described = {key: value for key, value in values.items() if key not in _OF_QUANTISATION}
    parts = [described]
    if isinstance(described.get("text_config"), dict):
        text = {key: value for key, value in described["text_config"].items() if key not in _OF_QUANTISATION}
        described["text_config"] = text
        parts.append(text)
    keys = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in (keys or [(described, "dtype")]) if models else ():
        part[key] = DTYPES[models[0]].name
    return described


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
