"""A checkpoint folder and which tensors hold what in each of its MoE layers: all is checked, no weight is read."""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf.encodings import PLAIN, Encoding, identify, problems
from jax_latent_moe.hf.families import layer_configs
from jax_latent_moe.hf.folder import TensorFolder
from jax_latent_moe.hf.names import MEGATRON, Layer, Names, Slot, layer_slots, tensor_shapes
from jax_latent_moe.hf.tensor_file import DTYPES, NAMES, TensorInfo, as_path, read_json

Naming = Literal["hf", "megatron"]
Path = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        folder: its tensors.
        configs: the configuration of each MoE layer.
        names: how its tensors are called.
    """

    folder: TensorFolder
    configs: Mapping[Layer, LatentMoEConfig]
    names: Names

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The MoE layers: their index in the model, or "mtp.1" for one of NemotronH's multi-token predictor."""
        return tuple(self.configs)

    @property
    def stacked_names(self) -> Names:
        """Names under which all experts of a layer are one tensor [E, out, in], as transformers 5 holds them."""
        return self.names.stacked(next(iter(self.configs.values())).gated)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors that hold one matrix or vector: its encoding, and each tensor by its suffix ("weight")."""

    encoding: Encoding
    parts: Mapping[str, TensorInfo]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Where each block of one layer's parameters is.

    Attributes:
        config: the layer.
        slots: every block of every parameter.
        tensors: what holds each tensor that the slots name.
        dtypes: the type in which each parameter is imported: as stored, or the model's where it is quantised.
    """

    config: LatentMoEConfig
    slots: tuple[Slot, ...]
    tensors: Mapping[str, Stored]
    dtypes: Mapping[Path, np.dtype]

    @property
    def quantised(self) -> tuple[str, ...]:
        """Names of the encodings in use other than the plain one."""
        return tuple(sorted({stored.encoding.name for stored in self.tensors.values()} - {PLAIN.name}))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in their files."""
        return sum(info.nbytes for stored in self.tensors.values() for info in stored.parts.values())


def open_checkpoint(
    path: str | os.PathLike[str], *, naming: Naming = "hf", config: LatentMoEConfig | None = None
) -> Checkpoint:
    """Opens a folder of safetensors files; reads config.json and the index, or the headers where there is no index.

    Args:
        path: the folder, as published on the Hugging Face hub.
        naming: "hf" for the names of the model's own family, "megatron" for Megatron's names.
        config: of all layers, for a folder in Megatron's names without config.json.

    Raises:
        CheckpointError: naming is unknown; or the folder, its index or its config.json is absent, not valid, or of an
            unknown model.
    """
    path = as_path(path)
    if naming not in get_args(Naming):
        raise CheckpointError(path, [f"naming={naming!r} is unknown: use one of {', '.join(get_args(Naming))}."])
    folder = TensorFolder(path)
    if config is None:
        configs, names = read_config(path / "config.json")
        return Checkpoint(folder, configs, MEGATRON if naming == "megatron" else names)
    if naming != "megatron":
        raise CheckpointError(path, ["config is for Megatron's names alone: others are read from config.json."])
    found = {re.match(r"decoder\.layers\.(\d+)\.mlp\.router\.weight$", name) for name in folder.file_of}
    layers = sorted(int(match[1]) for match in found if match)
    if not layers:
        raise CheckpointError(path, ["no tensor is called decoder.layers.N.mlp.router.weight."])
    return Checkpoint(folder, dict.fromkeys(layers, config), MEGATRON)


def read_config(path: pathlib.Path) -> tuple[dict[Layer, LatentMoEConfig], Names]:
    """The MoE layers that a config.json describes, and their names; CheckpointError if it does not."""
    values: dict[str, Any] = read_json(path)
    try:
        return layer_configs(values)
    except CheckpointError:
        raise
    except ValueError as error:  # ConfigError among them
        raise CheckpointError(path, [f"{error}."]) from error


def plan_layer(checkpoint: Checkpoint, layer: Layer) -> LayerPlan:
    """Finds every tensor of a layer and checks names, shapes and dtypes.

    Raises:
        CheckpointError: lists every missing, unexpected, mis-shaped or mistyped tensor.
    """
    folder = checkpoint.folder
    if layer not in checkpoint.layers:
        layers = ", ".join(map(str, checkpoint.layers))
        raise CheckpointError(folder.path, [f"layer {layer} is no MoE layer; these are: {layers}."])
    config = checkpoint.configs[layer]
    names, prefix = checkpoint.names, checkpoint.names.prefix(layer, folder.file_of)
    stacked = names.stacked(config.gated)
    whole = [prefix + name for name in (stacked.w_up, stacked.w_out) if prefix + name in folder.file_of]
    # Each also keeps an absurd number of experts from making as many names.
    if whole:
        names = stacked
        _check_stacked(folder, whole, config, layer)
    elif config.num_experts > len(folder.file_of):
        few = f"{len(folder.file_of)} tensors in all cannot hold num_experts={config.num_experts}."
        raise CheckpointError(folder.path, [f"layer {layer}: {few}"])
    try:
        slots = layer_slots(config, names)
    except ValueError as error:
        raise CheckpointError(folder.path, [f"layer {layer}: {error}"]) from error
    tensors, found = _match(folder, prefix, tensor_shapes(config, slots))
    dtypes, mistyped = _leaf_dtypes(prefix, slots, tensors, config)
    if found or mistyped:
        raise CheckpointError(f"{folder.path}, layer {layer}", found + mistyped)
    return LayerPlan(config, tuple(slots), tensors, dtypes)


def _check_stacked(folder, tensors, config, layer):
    """Each tensor of all experts has one matrix an expert, and no more than it can hold."""
    found = []
    for name, info in folder.locate(tensors).items():
        if len(info.shape) != 3 or info.shape[0] != config.num_experts or math.prod(info.shape) == 0:
            wanted = f"[num_experts={config.num_experts}, out, in]"
            found.append(f"{name}: shape {list(info.shape)}, expected {wanted}.")
    if found:
        raise CheckpointError(f"{folder.path}, layer {layer}", found)


def _match(folder, prefix, shapes) -> tuple[dict[str, Stored], list[str]]:
    """Groups the tensors that begin with prefix by the matrix or vector they hold; says what does not fit."""
    present = [name for name in folder.file_of if name.startswith(prefix) and not name.endswith("_extra_state")]
    if not present:
        return {}, [f"no tensor is called {prefix}*: is this layer in the files that you have?"]
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in folder.locate(present).items():
        tensor = name.removeprefix(prefix)
        if tensor in shapes and not tensor.endswith(".weight"):
            groups[tensor] = {"weight": info}
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
        else:
            tensors[tensor] = Stored(PLAIN, {"weight": parts["weight"]}) if "weight" in parts else None
            found += _plain_problems(prefix, tensor, shape, parts)
    found += [f"not expected: {prefix}{name}." for tensor, parts in groups.items() for name in _names(tensor, parts)]
    return {tensor: stored for tensor, stored in tensors.items() if stored}, found


def _missing(prefix, shapes, present) -> list[str]:
    """A sentence for each tensor that is missing; one for all of a kind where every expert lacks it."""
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
    """Of a tensor that is never quantised."""
    found = [f"not expected: {prefix}{name}." for name in _names(tensor, set(parts) - {"weight"})]
    if "weight" not in parts:
        return [*found, f"missing {prefix}{tensor}."]
    info = parts["weight"]
    if info.shape != shape:
        found.append(f"{prefix}{tensor}: shape {list(info.shape)}, expected {list(shape)}.")
    if info.dtype not in PLAIN.dtypes["weight"]:
        found.append(f"{prefix}{tensor}: dtype {info.dtype}, expected {' or '.join(PLAIN.dtypes['weight'])}.")
    return found


def _leaf_dtypes(prefix, slots, tensors, config) -> tuple[dict[Path, np.dtype], list[str]]:
    """The dtype of each parameter, and the tensors whose dtype does not fit."""
    model = NAMES[np.dtype(config.param_dtype)]
    stored_as: dict[Path, dict[str, str]] = {}
    for slot in slots:
        stored = tensors.get(slot.tensor)
        if stored is not None and stored.encoding is PLAIN and "weight" in stored.parts:
            dtype = stored.parts["weight"].dtype
            if dtype in PLAIN.dtypes["weight"]:
                stored_as.setdefault(slot.path, {})[slot.tensor] = dtype
    dtypes, found = {slot.path: DTYPES[model] for slot in slots}, []
    for path, by_tensor in stored_as.items():
        # A narrow correction bias has lost the differences that route: those of NemotronH are below 0.25 near 64.
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
