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
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.hf.checkpoint import Checkpoint, LayerPlan, plan_layer
from jax_latent_moe.hf.encodings import PLAIN
from jax_latent_moe.hf.folder import write_index
from jax_latent_moe.hf.importing import CHUNK, decode_stored
from jax_latent_moe.hf.names import Block, Layer, Names, layer_blocks, tensor_shapes
from jax_latent_moe.hf.outputs import copy_folder, new_folder
from jax_latent_moe.hf.quantised import stored_bytes, tensor_of
from jax_latent_moe.hf.tensor_file import DTYPES, NAMES, TensorInfo, create, opened, read_bytes, write_bytes
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.params import Params, check_params

_OF_QUANTISATION = ("quantization_config", "compression_config")


def replace_layers(
    checkpoint: Checkpoint, layers: Iterable[tuple[Layer, Params]], path: str | os.PathLike[str]
) -> None:
    """Writes a copy of the whole checkpoint to path, with these layers replaced.

    Files, names and dtypes stay as they are, so that the copy loads wherever the original did. Parameters that were
    imported as stored and not changed give the same files again. Parameters of another dtype are rounded to the stored
    one. Experts that are stored quantised are written from a `ScaledArray` of their format (`keep_quantized=True`);
    other quantised weights cannot change.

    Args:
        checkpoint: the original.
        layers: (layer, parameters) pairs. They are taken one at a time and need not be in memory together.
        path: a folder that does not exist yet; it appears when it is complete.

    Raises:
        CheckpointError: path exists, lies in the original or cannot be written; a layer comes twice or is not a layer
            of the original; experts are quantised there and not here, or the reverse; or another weight that is
            quantised there was changed (`write_layers` writes it unquantised).
        InputError: parameters do not fit their layer.
    """
    with new_folder(path, checkpoint.folder.path) as partial:
        copy_folder(checkpoint.folder.path, partial)
        for layer, params in _each_once(path, layers):
            plan = plan_layer(checkpoint, layer)
            check_params(params, plan.config)
            _refuse_adapters(path, params)
            if found := _unwritable(plan, params):
                raise CheckpointError(f"{checkpoint.folder.path}, layer {layer}", found)
            _write_pieces(_stored_pieces(plan, params), partial)


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
        CheckpointError: path exists or cannot be written, a layer is not in configs, comes twice or is quantised,
            `names` has no name for one of its parameters, a table of token ids gives its experts, or config_json cannot
            name the parameters' dtypes.
        InputError: parameters do not fit their layer.
    """
    with new_folder(path) as partial:
        file_of, total, dtypes_used = {}, 0, set()
        for layer, params in _each_once(path, layers):
            if layer not in tuple(configs):
                known = ", ".join(map(str, configs))
                raise CheckpointError(path, [f"layer {layer!r} has no configuration: the layers with one are {known}."])
            check_params(params, configs[layer])
            _check_dense(path, layer, params)
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
            placed = {name.removeprefix(prefix): info for name, info in infos.items()}
            _write_pieces(_chunks(blocks, params, placed), partial)
            file_of |= dict.fromkeys(infos, file)
            total += sum(info.nbytes for info in infos.values())
            dtypes_used |= {dtypes[block.tensor] for block in blocks if block.path != ("router", "bias")}
        write_index(partial, file_of, total)
        if config_json is not None:
            text = json.dumps(_described(path, config_json, dtypes_used), indent=2)
            (partial / "config.json").write_text(text + "\n")


def differing_tensors(plan: LayerPlan, params: Params) -> list[str]:
    """Names of the tensors whose stored bytes differ from those that these parameters would be written as.

    A weight that is stored quantised and is dense in params differs if its decoded values do.
    """
    differing = set(_changed(plan, params))
    with contextlib.ExitStack() as stack:
        files = _open_all(plan, stack)
        for tensor, info, offset, data in _stored_pieces(plan, params):
            stored = np.empty_like(data)
            read_bytes(files[info.file], info, offset, stored)
            if data.tobytes() != stored.tobytes():
                differing.add(tensor)
    return sorted(differing)


def _open_all(plan: LayerPlan, stack: contextlib.ExitStack):
    paths = {info.file for stored in plan.tensors.values() for info in stored.parts.values()}
    return {path: stack.enter_context(opened(path)) for path in paths}


def _check_dense(path, layer, params):
    """Refuses quantised experts, whose tensors another system may not name, and low-rank adapters."""
    _refuse_adapters(path, params)
    for name, leaf in params["experts"].items():
        if isinstance(leaf, ScaledArray):
            what = f"layer {layer}: experts/{name} is in format {leaf.format}"
            how = "dequantize(params, config) first; replace_layers writes codes into a copy of their checkpoint"
            raise CheckpointError(path, [f"{what}, and write_layers writes dense weights: {how}."])


def _refuse_adapters(path, params):
    for part, leaves in params.items():
        for name, leaf in leaves.items():
            if isinstance(leaf, LowRank):
                how = "lora.merge(params, config) makes it dense"
                raise CheckpointError(path, [f"{part}/{name} has a low-rank adapter, which no tensor holds: {how}."])


def _unwritable(plan: LayerPlan, params: Params) -> list[str]:
    """A sentence for each parameter that the stored tensors cannot take."""
    found = {}
    for block in plan.blocks:
        stored, leaf, name = plan.tensors[block.tensor], params[block.path[0]][block.path[1]], "/".join(block.path)
        if name in found:
            continue
        if isinstance(leaf, ScaledArray):
            try:
                list(stored_bytes(leaf, block, stored))
            except ValueError as error:
                found[name] = f"{error}: write_layers writes dense weights, after dequantize(params, config)."
        elif block.path[0] == "experts" and stored.encoding is not PLAIN:
            found[name] = (
                f"{name} is stored as {stored.encoding.name} and is dense here: import it with keep_quantized=True, or "
                "let write_layers write the layer unquantised."
            )
    if found:
        return list(found.values())
    return [
        f"{tensor} is stored as {plan.tensors[tensor].encoding.name} and was changed: write_layers writes it "
        "unquantised."
        for tensor in _changed(plan, params)
    ]


def _changed(plan: LayerPlan, params: Params) -> list[str]:
    """The tensors of dense parameters that are stored quantised and no longer decode to these parameters."""
    changed = []
    with contextlib.ExitStack() as stack:
        files = _open_all(plan, stack)
        for block in plan.blocks:
            stored, leaf = plan.tensors[block.tensor], params[block.path[0]][block.path[1]]
            if stored.encoding is PLAIN or isinstance(leaf, ScaledArray):
                continue
            whole = block.layout == "transposed"
            values = decode_stored(block.tensor, stored, files, None if whole else block.expert)
            matrix = _matrix(leaf, block)
            if not np.array_equal(matrix.T if whole else matrix, values.astype(matrix.dtype)):
                changed.append(block.tensor)
    return changed


def _stored_pieces(plan: LayerPlan, params: Params) -> Iterator[tuple[str, TensorInfo, int, np.ndarray]]:
    """The pieces of every tensor that these parameters are written to, also of experts kept as stored."""
    plain = {tensor: stored.parts["weight"] for tensor, stored in plan.tensors.items() if stored.encoding is PLAIN}
    yield from _chunks([block for block in plan.blocks if block.tensor in plain], params, plain)
    for block in plan.blocks:
        leaf = params[block.path[0]][block.path[1]]
        if isinstance(leaf, ScaledArray):
            for suffix, info, offset, data in stored_bytes(leaf, block, plan.tensors[block.tensor]):
                yield tensor_of(block, suffix), info, offset, data


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


def _write_pieces(pieces: Iterable[tuple[str, TensorInfo, int, np.ndarray]], folder: pathlib.Path):
    with contextlib.ExitStack() as stack:
        files = {}
        for _, info, offset, data in pieces:
            name = info.file.name
            if name not in files:
                files[name] = stack.enter_context((folder / name).open("r+b", buffering=0))
            write_bytes(files[name], info, offset, data)


def _chunks(blocks, params, infos) -> Iterator[tuple[str, TensorInfo, int, np.ndarray]]:
    """Yields (tensor, its place, byte offset, data), in the tensor's dtype and order, a small piece at a time."""
    for block in blocks:
        matrix, info = _matrix(params[block.path[0]][block.path[1]], block), infos[block.tensor]
        dtype = DTYPES[info.dtype]
        if matrix.ndim == 1:
            yield block.tensor, info, 0, matrix.astype(dtype)
            continue
        width, rows = matrix.shape
        step = max(1, CHUNK // max(1, width * dtype.itemsize))
        for first in range(0, rows, step):
            offset = (block.first_row + first) * width * dtype.itemsize
            yield block.tensor, info, offset, np.ascontiguousarray(matrix[:, first : first + step].T.astype(dtype))


def _matrix(leaf, block: Block) -> np.ndarray:
    """A block of a dense parameter as the transpose of the tensor's rows, or [n]; to the host, one expert at a time."""
    matrix = np.asarray(leaf if block.expert is None else leaf[block.expert])
    if block.layout == "pairs":
        matrix = matrix.swapaxes(-1, -2).reshape(len(matrix), -1)
    if block.layout != "transposed":
        return matrix.T
    return matrix if block.half is None else matrix[:, block.half]
