"""Imports the MoE layers of a NemotronH checkpoint, balances their experts, exports them and reads them again.

    python -m examples.import_hf FOLDER

The example makes a small random checkpoint in FOLDER/original. Both of its layers are MoE layers. It imports them and
moves their correction biases until the loads of the experts are even. Then it writes FOLDER/balanced, which loads in
every program that loads the original. In an environment with torch and transformers,

    python examples/check_with_transformers.py FOLDER/balanced

loads it and compares the outputs of the layers. For a published model, start at `open_checkpoint`.
"""

import argparse
import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe import hf, latent_moe, update_correction_bias
from jax_latent_moe.hf.tensor_file import DTYPES, create, write_bytes
from jax_latent_moe.piped import piped

VOCABULARY, WIDTH, LAYERS, EXPERTS = 64, 32, 2, 8
STEPS, RATE, TOKENS = 40, 0.01, 512


def make_checkpoint(folder: pathlib.Path, latent: int = 16, inner: int = 24) -> None:
    """Writes random weights and a config.json that transformers loads as a NemotronHForCausalLM.

    Args:
        folder: a new folder.
        latent: latent width.
        inner: inner width of a routed expert.
    """
    config = dict(
        architectures=["NemotronHForCausalLM"],
        model_type="nemotron_h",
        dtype="bfloat16",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        layers_block_type=["moe"] * LAYERS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_latent_size=latent,
        moe_intermediate_size=inner,
        moe_shared_expert_intermediate_size=40,
        mlp_hidden_act="relu2",
        routed_scaling_factor=2.5,
    )
    shapes: dict[str, tuple[int, ...]]
    shapes = {"backbone.embeddings.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shapes["backbone.norm_f.weight"] = (WIDTH,)
    for layer in range(LAYERS):
        block = f"backbone.layers.{layer}."
        shapes |= {
            f"{block}norm.weight": (WIDTH,),
            f"{block}mixer.gate.weight": (EXPERTS, WIDTH),
            f"{block}mixer.gate.e_score_correction_bias": (EXPERTS,),
            f"{block}mixer.fc1_latent_proj.weight": (latent, WIDTH),
            f"{block}mixer.fc2_latent_proj.weight": (WIDTH, latent),
            f"{block}mixer.shared_experts.up_proj.weight": (40, WIDTH),
            f"{block}mixer.shared_experts.down_proj.weight": (WIDTH, 40),
        }
        for expert in range(EXPERTS):
            shapes[f"{block}mixer.experts.{expert}.up_proj.weight"] = (inner, latent)
            shapes[f"{block}mixer.experts.{expert}.down_proj.weight"] = (latent, inner)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: ("F32" if name.endswith("bias") else "BF16", shape) for name, shape in shapes.items()}
    infos = create(folder / "model.safetensors", tensors)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("r+b", buffering=0) as file:
        for name, info in infos.items():
            values = rng.normal(size=info.shape) / info.shape[-1] ** 0.5
            if len(info.shape) == 1:
                # Published correction biases lie near 64. Only their small differences change the routing.
                values = 64 + rng.uniform(0, 0.25, info.shape) if name.endswith("bias") else np.ones(info.shape)
            write_bytes(file, info, 0, values.astype(DTYPES[info.dtype]))


def imbalance(loads: jax.Array) -> float:
    """Load of the busiest expert, divided by the mean load."""
    return float(jnp.max(loads) / jnp.mean(loads))


def balance(params, config, x: jax.Array):
    """The parameters with a new correction bias, which spreads the tokens of x evenly over the experts."""
    loads_of = jax.jit(lambda params, x: latent_moe(params, x, config)[1].tokens_per_expert)
    first = imbalance(loads_of(params, x))
    for _ in range(STEPS):
        bias = update_correction_bias(params["router"]["bias"], loads_of(params, x), RATE)
        params = params | {"router": params["router"] | {"bias": bias}}
    print(f"  load of the busiest expert over the mean: {first:.2f} before, {imbalance(loads_of(params, x)):.2f} after")
    return params


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="a new folder")
    folder = parser.parse_args(arguments).folder
    if os.path.lexists(folder):
        parser.error(f"{folder} exists already, and the example overwrites nothing: name a new folder.")
    original, balanced = folder / "original", folder / "balanced"
    make_checkpoint(original)

    checkpoint = hf.open_checkpoint(original)
    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
    tuned, expected = {}, {"x": np.asarray(x)}
    for layer, params in hf.import_layers(checkpoint):
        print(f"layer {layer}: imported")
        config = checkpoint.configs[layer]
        tuned[layer] = balance(params, config, x)
    hf.replace_layers(checkpoint, tuned.items(), balanced)

    again = hf.open_checkpoint(balanced)
    for layer, params in hf.import_layers(again):
        bits_back = jax.tree.map(lambda one, other: bool(jnp.all(one == other)), params, tuned[layer])
        assert all(jax.tree.leaves(bits_back)), f"layer {layer} differs from what was exported"
        wide = dataclasses.replace(again.configs[layer], dtype="float32")
        expected[f"y{layer}"] = np.asarray(latent_moe(hf.import_layer(again, layer, dtype="float32"), x, wide)[0])
    np.savez(balanced / "expected.npz", allow_pickle=False, **expected)
    print(f"wrote {balanced}: both layers read back bit for bit")


if __name__ == "__main__":
    with piped():
        main()
