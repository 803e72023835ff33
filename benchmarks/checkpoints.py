"""Synthetic checkpoints of one layer of a published model, in the names and encodings of its family.

Every byte of the data is below 64, which is a valid code, scale or bfloat16 number in every encoding.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jax_latent_moe import LatentMoEConfig, presets
from jax_latent_moe.hf.encodings import FP8, MXFP4, NVFP4_MODELOPT, PLAIN, Encoding
from jax_latent_moe.hf.names import KIMI, NEMOTRON_H, Names, layer_blocks, tensor_shapes
from jax_latent_moe.hf.tensor_file import create

BUFFER = 8 << 20
FILES = 4


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a model is stored.

    Attributes:
        config: its layer.
        values: config.json from the layer, which is layer 0.
        names: the names of its tensors.
        experts: the encoding of the experts' matrices.
        others: the encoding of the projections and the shared experts.
    """

    config: LatentMoEConfig
    values: Callable[[LatentMoEConfig], dict[str, Any]]
    names: Names
    experts: Encoding = PLAIN
    others: Encoding = PLAIN


def nemotron_h(config: LatentMoEConfig) -> dict[str, Any]:
    """config.json of Nemotron-3."""
    return dict(
        model_type="nemotron_h",
        dtype="bfloat16",
        layers_block_type=["moe"],
        hidden_size=config.hidden_size,
        moe_latent_size=config.latent_size,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_intermediate_size,
        moe_shared_expert_intermediate_size=config.shared_expert_intermediate_size,
        routed_scaling_factor=config.router.routed_scaling_factor,
    )


def kimi_k3(config: LatentMoEConfig) -> dict[str, Any]:
    """config.json of Kimi K3."""
    text = dict(
        model_type="kimi_linear",
        num_hidden_layers=1,
        first_k_dense_replace=0,
        hidden_size=config.hidden_size,
        routed_expert_hidden_size=config.latent_size,
        latent_moe_use_norm=True,
        rms_norm_eps=config.latent_norm_eps,
        num_experts=config.num_experts,
        num_experts_per_token=config.top_k,
        num_shared_experts=config.shared_expert_intermediate_size // config.expert_intermediate_size,
        moe_intermediate_size=config.expert_intermediate_size,
        routed_scaling_factor=config.router.routed_scaling_factor,
        moe_router_activation_func="sigmoid",
        hidden_act="situ",
        activation_situ_beta=config.situ_beta,
        activation_situ_linear_beta=config.situ_linear_beta,
    )
    return dict(model_type="kimi_k3", dtype="bfloat16", text_config=text)


SUPER = Stored(presets.NEMOTRON_3_SUPER, nemotron_h, NEMOTRON_H)
SUPER_NVFP4 = dataclasses.replace(SUPER, experts=NVFP4_MODELOPT, others=FP8)
K3_MXFP4 = Stored(presets.KIMI_K3, kimi_k3, KIMI, experts=MXFP4)


def tensors(stored: Stored, config: LatentMoEConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each tensor of the layer, by its name in the files."""
    names, found = stored.names, {}
    prefix = names.prefix(0, ())
    for name, shape in tensor_shapes(config, layer_blocks(config, names)).items():
        if len(shape) == 1 or name == names.router:
            found[prefix + name] = ("F32" if name == names.router_bias else "BF16", shape)
            continue
        encoding = stored.experts if name.startswith("experts.") else stored.others
        shapes = encoding.shapes(*shape)
        parts = {suffix: (dtypes[0], shapes[suffix][0]) for suffix, dtypes in encoding.dtypes.items()}
        parts |= {suffix: ("F32", ()) for suffix in encoding.unused}
        found |= {prefix + name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    return found


def make(folder: pathlib.Path, stored: Stored, experts: int | None = None) -> None:
    """Writes the checkpoint in FILES files into an empty folder, with fewer experts if given."""
    config = stored.config
    if experts is not None:
        config = dataclasses.replace(config, num_experts=experts, top_k=min(config.top_k, experts))
    (folder / "config.json").write_text(json.dumps(stored.values(config)))
    listed = sorted(tensors(stored, config).items())
    noise = np.random.default_rng(0).integers(0, 64, BUFFER, np.uint8)

    def write(number):
        path = folder / f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        part = dict(listed[number * len(listed) // FILES : (number + 1) * len(listed) // FILES])
        position, end = min(info.start for info in create(path, part).values()), path.stat().st_size
        with path.open("r+b", buffering=0) as file:
            while position < end:
                position += os.pwrite(file.fileno(), noise[: end - position], position)

    with ThreadPoolExecutor(FILES) as pool:
        list(pool.map(write, range(FILES)))


def read(folder: pathlib.Path) -> int:
    """Reads the files in order through one buffer; returns their bytes."""
    buffer, total = bytearray(BUFFER), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total
