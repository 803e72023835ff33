"""Writes layers to safetensors files. A layer that was imported as stored comes back bit for bit."""

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
from jax_latent_moe.hf.names import Block, Layer, Names, layer_blocks, tensor_shapes
from jax_latent_moe.hf.outputs import copy_folder, new_folder
from jax_latent_moe.hf.tensor_file import DTYPES, NAMES, TensorInfo, create, opened, read_bytes, write_bytes
from jax_latent_moe.params import Params, check_params

_OF_QUANTISATION = ("quantization_config", "compression_config")


def replace_layers(
    checkpoint: Checkpoint, layers: Iterable[tuple[Layer, Params]], path: str | os.PathLike[str]
) -> None:
    """Writes a copy of the whole checkpoint to path, with these layers replaced.

    Files, names and dtypes stay as they are, so that the copy loads wherever the original did. Parameters that were
    imported as stored and not changed give the same files again. Parameters of another dtype are rounded to the stored
    one.

    Args:
        checkpoint: the original.
        layers: (layer, parameters) pairs. They are taken one at a time and need not be in memory together.
        path: a folder that does not exist yet; it appears when it is complete.

    Raises:
        CheckpointError: path exists, lies in the original or cannot be written; a layer comes twice, is not a layer of
            the original, or is quantised there (`write_layers` writes it unquantised).
        InputError: parameters do not fit their layer.
    """
    with new_folder(path, checkpoint.folder.path) as partial:
        copy_folder(checkpoint.folder.path, partial)
        for layer, params in _each_once(path, layers):
            plan = plan_layer(checkpoint, layer)
            if plan.quantised:
                how = " and ".join(plan.quantised)
                raise CheckpointError(
                    checkpoint.folder.path,
                    [f"layer {layer} is stored as {how} and cannot be replaced: write_layers writes it unquantised."],
                )
            check_params(params, plan.config)
            infos = {tensor: stored.parts["weight"] for tensor, stored in plan.tensors.items()}
            _write_blocks(plan.blocks, params, infos, partial)


def write_layers(
    path: str | os.PathLike[str],
    layers: Iterable[tuple[Layer, Params]],
    configs: Mapping[Layer, LatentMoEConfig],
    names: Names,
    *,
    config_json: Mapping[str, Any] | None = None,
) -> None:
    """Writes only MoE layers, one file per layer and an index, with the tensor names of any system.

    Args:
        path: a folder that does not exist yet; it appears when it is complete.
        layers: (layer, parameters) pairs. They are taken one at a time and need not be in memory together.
        configs: the configuration of each layer.
        names: the tensor names, such as `MEGATRON` or `Checkpoint.names`.
        config_json: values of a config.json to write as well, so that `open_checkpoint` can read the folder. Its dtype
            becomes that of the parameters, and its keys about quantisation are left out.

    Raises:
        CheckpointError: path exists or cannot be written, a layer is not in configs or comes twice, `names` has no name
            for one of its parameters, its experts are those of a table of token ids, or config_json cannot name the
            parameters' dtypes.
        InputError: parameters do not fit their layer.
    """
    with new_folder(path) as partial:
        file_of, total, dtypes_used = {}, 0, set()
        for layer, params in _each_once(path, layers):
            if layer not in tuple(configs):
                known = ", ".join(map(str, configs))
                raise CheckpointError(path, [f"layer {layer!r} has no configuration; these have one: {known}."])
            check_params(params, configs[layer])
            if configs[layer].router.selection == "given":
                table = "has a table of token ids, which is no parameter: write it with replace_layers."
                raise CheckpointError(path, [f"layer {layer} {table}"])
            try:
                blocks, prefix = layer_blocks(configs[layer], names), names.prefix(layer, ())
                dtypes = {block.tensor: _format_name(params, block) for block in blocks}
            except ValueError as error:
                raise CheckpointError(path, [f"layer {layer}: {error}"]) from error
            file = f"moe-layer-{layer}.safetensors"
            shapes = tensor_shapes(configs[layer], blocks)
            infos = create(partial / file, {prefix + t: (dtypes[t], shape) for t, shape in shapes.items()})
            _write_blocks(blocks, params, {name.removeprefix(prefix): info for name, info in infos.items()}, partial)
            file_of |= dict.fromkeys(infos, file)
            total += sum(info.nbytes for info in infos.values())
            dtypes_used |= {dtypes[block.tensor] for block in blocks if block.path != ("router", "bias")}
        write_index(partial, file_of, total)
        if config_json is not None:
            text = json.dumps(_described(path, config_json, dtypes_used), indent=2)
            (partial / "config.json").write_text(text + "\n")


def differing_tensors(plan: LayerPlan, params: Params) -> list[str]:
    """Names of the tensors whose stored bytes differ from those that these parameters would be written as."""
    differing = set()
    infos = {tensor: stored.parts["weight"] for tensor, stored in plan.tensors.items()}
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(opened(path)) for path in {info.file for info in infos.values()}}
        for block, offset, data in _chunks(plan.blocks, params, infos):
            stored = np.empty_like(data)
            read_bytes(files[infos[block.tensor].file], infos[block.tensor], offset, stored)
            if data.tobytes() != stored.tobytes():
                differing.add(block.tensor)
    return sorted(differing)


def _each_once(path, layers: Iterable[tuple[Layer, Params]]) -> Iterator[tuple[Layer, Params]]:
    seen = set()
    for layer, params in layers:
        if layer in seen:
            raise CheckpointError(path, [f"layer {layer} comes twice: give each layer once."])
        seen.add(layer)
        yield layer, params


def _format_name(params: Params, block: Block) -> str:
    """The parameter's dtype as safetensors calls it."""
    part, leaf = block.path
    dtype = np.dtype(params[part][leaf].dtype)
    if dtype not in NAMES:
        raise ValueError(f"{part}/{leaf} is {dtype}, which safetensors files cannot hold: convert it to bfloat16.")
    return NAMES[dtype]


def _described(path, values: Mapping[str, Any], dtypes: set[str]) -> dict[str, Any]:
    """The values of a config.json, with the dtype that its tensors have now. float32 may stand beside any other."""
    models = sorted(dtypes - {"F32"}) or sorted(dtypes)
    if len(models) > 1:
        raise CheckpointError(
            path, [f"the parameters are {' and '.join(models)}, but config.json names one dtype: convert them to one."]
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


def _write_blocks(blocks: Iterable[Block], params: Params, infos: dict[str, TensorInfo], folder: pathlib.Path):
    with contextlib.ExitStack() as stack:
        names = {info.file.name for info in infos.values()}
        files = {name: stack.enter_context((folder / name).open("r+b", buffering=0)) for name in names}
        for block, offset, data in _chunks(blocks, params, infos):
            info = infos[block.tensor]
            write_bytes(files[info.file.name], info, offset, data)


def _chunks(blocks, params, infos) -> Iterator[tuple[Block, int, np.ndarray]]:
    """Yields (block, byte offset in its tensor, data), in the tensor's dtype and order, a small piece at a time."""
    for block in blocks:
        leaf = params[block.path[0]][block.path[1]]
        matrix = np.asarray(leaf if block.expert is None else leaf[block.expert])  # to the host, one expert at a time
        dtype = DTYPES[infos[block.tensor].dtype]
        if block.layout == "pairs":
            matrix = matrix.swapaxes(-1, -2).reshape(len(matrix), -1)
        if block.layout != "transposed":
            matrix = matrix.T  # what follows turns it around again
        if matrix.ndim == 1:
            yield block, 0, matrix.astype(dtype)
            continue
        if block.half is not None:
            matrix = matrix[:, block.half]
        width, rows = matrix.shape
        step = max(1, CHUNK // max(1, width * dtype.itemsize))
        for first in range(0, rows, step):
            offset = (block.first_row + first) * width * dtype.itemsize
            yield block, offset, np.ascontiguousarray(matrix[:, first : first + step].T.astype(dtype))
