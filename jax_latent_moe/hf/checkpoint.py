"""Opens a checkpoint folder and finds the tensors of each MoE layer. It checks all of them and reads no weight."""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import CheckpointError, InputError
from jax_latent_moe.hf.encodings import MXFP4_BLOCKS, PLAIN, Encoding, identify, problems
from jax_latent_moe.hf.families import layer_configs
from jax_latent_moe.hf.folder import TensorFolder
from jax_latent_moe.hf.names import MEGATRON, Block, Layer, Names, layer_blocks, tensor_shapes
from jax_latent_moe.hf.tensor_file import DTYPES, NAMES, TensorInfo, as_path, read_json

Naming = Literal["hf", "megatron"]
Path = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        folder: the folder's tensors.
        configs: the configuration of each MoE layer.
        names: the names of its tensors.
    """

    folder: TensorFolder
    configs: Mapping[Layer, LatentMoEConfig]
    names: Names

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The MoE layers: the index in the model, or "mtp.1" for a layer of NemotronH's multi-token predictor."""
        return tuple(self.configs)

    @property
    def stacked_names(self) -> Names:
        """The names of transformers 5, which holds all experts of a layer in one tensor [E, out, in]."""
        return self.names.stacked(next(iter(self.configs.values())).gated)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors that hold one matrix or vector: the encoding, and each tensor by its suffix (such as "weight")."""

    encoding: Encoding
    parts: Mapping[str, TensorInfo]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The tensors that hold one layer, and the block of a parameter that each of them holds.

    Attributes:
        config: the layer's configuration.
        blocks: every block of every parameter.
        tensors: the stored form of each tensor that the blocks name.
        dtypes: the dtype in which each parameter is imported: the stored one, or the model's if it is quantised.
        token_experts: the table that gives the experts of each token id; None if the router chooses them.
    """

    config: LatentMoEConfig
    blocks: tuple[Block, ...]
    tensors: Mapping[str, Stored]
    dtypes: Mapping[Path, np.dtype]
    token_experts: TensorInfo | None = None

    @property
    def quantised(self) -> tuple[str, ...]:
        """Names of the encodings in use, without the plain one."""
        return tuple(sorted({stored.encoding.name for stored in self.tensors.values()} - {PLAIN.name}))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in their files."""
        return sum(info.nbytes for stored in self.tensors.values() for info in stored.parts.values())


def open_checkpoint(
    path: str | os.PathLike[str], *, naming: Naming = "hf", config: LatentMoEConfig | None = None
) -> Checkpoint:
    """Opens a folder of safetensors files. It reads config.json and the index, or all headers if there is no index.

    Args:
        path: the folder, as published on the Hugging Face hub.
        naming: "hf" for the names of the model's own family, "megatron" for Megatron's names.
        config: the configuration of all layers, for a folder with Megatron's names and without config.json.

    Raises:
        CheckpointError: naming is unknown; the folder, its index or its config.json is absent or not valid; or the
            model is unknown.
    """
    path = as_path(path)
    if naming not in get_args(Naming):
        raise CheckpointError(path, [f"naming={naming!r} is unknown: use one of {', '.join(get_args(Naming))}."])
    folder = TensorFolder(path)
    if config is None:
        configs, names = read_config(path / "config.json")
        return Checkpoint(folder, configs, MEGATRON if naming == "megatron" else names)
    if naming != "megatron":
        raise CheckpointError(path, ["config= needs naming='megatron': for other names, config.json is read."])
    found = {re.match(r"decoder\.layers\.(\d+)\.mlp\.router\.weight$", name) for name in folder.file_of}
    layers = sorted(int(match[1]) for match in found if match)
    if not layers:
        raise CheckpointError(path, ["no tensor is called decoder.layers.N.mlp.router.weight."])
    return Checkpoint(folder, dict.fromkeys(layers, config), MEGATRON)


def read_config(path: pathlib.Path) -> tuple[dict[Layer, LatentMoEConfig], Names]:
    """The MoE layers that a config.json describes, and their tensor names; CheckpointError if it describes none."""
    values: dict[str, Any] = read_json(path)
    try:
        return layer_configs(values)
    except CheckpointError:
        raise
    except ValueError as error:  # ConfigError among them
        raise CheckpointError(path, [f"{error}."]) from error


def plan_layer(checkpoint: Checkpoint, layer: Layer) -> LayerPlan:
    """Finds every tensor of a layer and checks its name, shape and dtype.

    Raises:
        CheckpointError: tensors are missing or unexpected, or have a wrong shape or dtype; the error lists them all.
        InputError: checkpoint is of another type.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise InputError(f"checkpoint of type {type(checkpoint).__name__} must be what open_checkpoint(path) returns.")
    folder = checkpoint.folder
    if layer not in checkpoint.layers:
        layers = ", ".join(map(str, checkpoint.layers))
        raise CheckpointError(folder.path, [f"layer {layer} is not an MoE layer: the MoE layers are {layers}."])
    config = checkpoint.configs[layer]
    names, prefix = checkpoint.names, checkpoint.names.prefix(layer, folder.file_of)
    stacked = names.stacked(config.gated)
    whole = [
        prefix + name + suffix
        for name in (stacked.w_up, stacked.w_out)
        for suffix in ("", *(f"_{part}" for part in MXFP4_BLOCKS.dtypes))
        if prefix + name + suffix in folder.file_of
    ]
    # Both checks come before any name is built, so that an absurd num_experts does not build as many names.
    if whole:
        names = stacked
        _check_stacked(folder, whole, config, layer)
    elif config.num_experts > len(folder.file_of):
        few = f"the {len(folder.file_of)} tensors of the folder cannot hold num_experts={config.num_experts}."
        raise CheckpointError(folder.path, [f"layer {layer}: {few}"])
    try:
        blocks = layer_blocks(config, names)
    except ValueError as error:
        raise CheckpointError(folder.path, [f"layer {layer}: {error}"]) from error
    given = config.router.selection == "given"
    table, found = _table(folder, prefix + names.token_experts, config) if given else (None, [])
    tensors, unfit = _match(folder, prefix, tensor_shapes(config, blocks), names)
    dtypes, mistyped = _leaf_dtypes(prefix, blocks, tensors, config)
    if found or unfit or mistyped:
        raise CheckpointError(f"{folder.path}, layer {layer}", found + unfit + mistyped)
    return LayerPlan(config, tuple(blocks), tensors, dtypes, table)


def _table(folder, name, config) -> tuple[TensorInfo | None, list[str]]:
    """The table of token ids of a layer, and a sentence for each thing wrong with it."""
    if name not in folder.file_of:
        return None, [f"missing {name}."]
    info = folder.locate([name])[name]
    if len(info.shape) != 2 or info.shape[1] != config.top_k or info.dtype not in ("I64", "I32", "I16", "U8"):
        return info, [f"{name}: {info.dtype} {list(info.shape)}, expected integers [vocabulary, top_k={config.top_k}]."]
    return info, []


def _check_stacked(folder, tensors, config, layer):
    """Checks that each stacked tensor holds one non-empty matrix for each expert."""
    found = []
    for name, info in folder.locate(tensors).items():
        if len(info.shape) < 3 or info.shape[0] != config.num_experts or math.prod(info.shape) == 0:
            wanted = f"[num_experts={config.num_experts}, out, in]"
            found.append(f"{name}: shape {list(info.shape)}, expected {wanted}.")
    if found:
        raise CheckpointError(f"{folder.path}, layer {layer}", found)


def _match(folder, prefix, shapes, names) -> tuple[dict[str, Stored], list[str]]:
    """Groups the tensors that begin with prefix by the matrix or vector they hold, and lists what does not fit."""
    present = [name for name in folder.file_of if name.startswith(prefix) and not name.endswith("_extra_state")]
    present = [name for name in present if name.removeprefix(prefix) != names.token_experts]
    if not present:
        return {}, [f"no tensor is called {prefix}*: check that you have the files of this layer."]
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in folder.locate(present).items():
        tensor = name.removeprefix(prefix)
        whole, _, part = tensor.rpartition("_")
        if tensor in shapes and not tensor.endswith(".weight"):
            groups[tensor] = {"weight": info}
        elif names.interleaved and whole in shapes and part in MXFP4_BLOCKS.dtypes:
            groups.setdefault(whole, {})[part] = info
        else:
            matrix, _, suffix = tensor.rpartition(".")
            groups.setdefault(f"{matrix}.weight", {})[suffix] = info
    tensors, found = {}, _missing(prefix, shapes, groups)
    for tensor, shape in shapes.items():
        parts = groups.pop(tensor, {})
        if not parts:
            continue
        if len(shape) == 2 and tensor.endswith(".weight"):
            encoding = identify(parts)
            found += problems(prefix + tensor.removesuffix("weight"), encoding, shape, parts)
            tensors[tensor] = Stored(encoding, parts)
        elif names.interleaved and len(shape) == 3 and "weight" not in parts:
            found += _stacked_problems(prefix + tensor, shape, parts)
            tensors[tensor] = Stored(MXFP4_BLOCKS, parts)
        else:
            tensors[tensor] = Stored(PLAIN, {"weight": parts["weight"]}) if "weight" in parts else None
            found += _plain_problems(prefix, tensor, shape, parts)
    found += [f"not expected: {prefix}{name}." for tensor, parts in groups.items() for name in _names(tensor, parts)]
    return {tensor: stored for tensor, stored in tensors.items() if stored}, found


def _stacked_problems(name, shape, parts):
    """The faults in the codes and scales of all experts, whose values would be [E, in, out]."""
    experts, width, out = shape
    found = [
        f"{name}_{part}: shape {list(info.shape)}, expected one for each of {experts} experts."
        for part, info in parts.items()
        if info.shape[:1] != (experts,)
    ]
    one = {part: info._replace(shape=info.shape[1:]) for part, info in parts.items()}
    return found or problems(f"{name}_", MXFP4_BLOCKS, (out, width), one)


def _missing(prefix, shapes, present) -> list[str]:
    """A sentence for each missing tensor, or one sentence for all experts if every expert lacks it."""
    kinds: dict[str, list[str]] = {}
    for tensor in shapes:
        kinds.setdefault(re.sub(r"(?<=experts\.)[0-9]+(?=\.)|(?<=weight)[0-9]+$", "{e}", tensor), []).append(tensor)
    found = []
    for kind, tensors in kinds.items():
        missing = [tensor for tensor in tensors if tensor not in present]
        if len(missing) == len(tensors) > 1:
            found.append(f"missing {prefix}{kind} of all {len(tensors)} experts.")
        else:
            found += [f"missing {prefix}{tensor}." for tensor in missing]
    return found


def _names(tensor, parts):
    return [f"{tensor.removesuffix('weight')}{suffix}".removeprefix(".") for suffix in parts]


def _plain_problems(prefix, tensor, shape, parts):
    """The faults in a tensor that is never quantised."""
    found = [f"not expected: {prefix}{name}." for name in _names(tensor, set(parts) - {"weight"})]
    if "weight" not in parts:
        return [*found, f"missing {prefix}{tensor}."]
    info = parts["weight"]
    if info.shape != shape:
        found.append(f"{prefix}{tensor}: shape {list(info.shape)}, expected {list(shape)}.")
    if info.dtype not in PLAIN.dtypes["weight"]:
        found.append(f"{prefix}{tensor}: dtype {info.dtype}, expected {' or '.join(PLAIN.dtypes['weight'])}.")
    return found


def _leaf_dtypes(prefix, blocks, tensors, config) -> tuple[dict[Path, np.dtype], list[str]]:
    """The dtype of each parameter, and a sentence for each tensor whose dtype does not fit."""
    model = NAMES[np.dtype(config.param_dtype)]
    stored_as: dict[Path, dict[str, str]] = {}
    for block in blocks:
        stored = tensors.get(block.tensor)
        if stored is not None and stored.encoding is PLAIN and "weight" in stored.parts:
            dtype = stored.parts["weight"].dtype
            if dtype in PLAIN.dtypes["weight"]:
                stored_as.setdefault(block.path, {})[block.tensor] = dtype
    dtypes, found = {block.path: DTYPES[model] for block in blocks}, []
    for path, by_tensor in stored_as.items():
        # A 16-bit correction bias cannot tell experts apart: NemotronH's biases are near 64 and differ by less than
        # 0.25, which bfloat16 rounds away.
        allowed = ("F32",) if path == ("router", "bias") else tuple(dict.fromkeys((model, "F32")))
        expected = next(iter(by_tensor.values())) if next(iter(by_tensor.values())) in allowed else allowed[0]
        for tensor, dtype in by_tensor.items():
            if dtype != expected:
                what = "like the others of this parameter" if expected != model else "the model's dtype"
                what = "float32 always" if path == ("router", "bias") else what
                found.append(f"{prefix}{tensor}: dtype {dtype}, expected {expected}, {what}.")
        dtypes[path] = DTYPES[expected]
    if ("router", "bias") in dtypes:
        dtypes["router", "bias"] = DTYPES["F32"]
    return dtypes, found
