"""What each weight format costs in accuracy: `python -m benchmarks.formats [RUN]`.

It prints the error of one layer's output against its dense float32 weights, for random weights of a relu2 and of a
swiglu layer. With the folder of a trained run of `examples.train` it also prints that model's bits per byte on a part
of its held-out text, with all experts in each format.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.train.corpus import load_corpus
from examples.train.data import held_out_windows
from examples.train.generate import load
from examples.train.mlp import moe_config
from examples.train.placing import make_mesh
from examples.train.run_folder import read_config
from examples.train.step import TrainState, make_bits_per_byte
from examples.train.train import VALIDATION_WINDOWS
from jax_latent_moe import ConfigError, LatentMoEConfig, dequantize, init_params, latent_moe, quantize
from jax_latent_moe.formats import FORMATS, encode
from jax_latent_moe.piped import piped

TOKENS = 256
LAYERS = {
    activation: LatentMoEConfig(
        hidden_size=512,
        latent_size=256,
        num_experts=32,
        top_k=4,
        expert_intermediate_size=384,
        activation=activation,
        dtype="float32",
    )
    for activation in ("relu2", "swiglu")
}


def bits_per_weight(name: str, k: int = 1024, n: int = 2688) -> float:
    """Bits of codes and scales for each weight of a matrix of Nemotron-3 Super."""
    array = jax.eval_shape(lambda values: encode(values, name), jax.ShapeDtypeStruct((1, k, n), jnp.float32))
    return 8 * array.nbytes / (k * n)


def layer_error(config: LatentMoEConfig, name: str) -> float:
    """||y - y of dense weights|| / ||y of dense weights||, in float32."""
    params = init_params(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (TOKENS, config.hidden_size))
    run = jax.jit(lambda params: latent_moe(params, x, config)[0])
    exact = run(params)
    return float(jnp.linalg.norm(run(quantize(params, config, name)) - exact) / jnp.linalg.norm(exact))


def bits_per_byte(run: Path) -> dict[str, float]:
    """The bits per byte of a trained model: "dense", and with its experts in each format that their sizes allow."""
    config = read_config(run)
    model, state, tokenizer = load(run)
    layer = moe_config(config)
    held_out = tokenizer.encode_text(load_corpus(config.data, config.data_column).validation)
    windows = held_out_windows(config, tokenizer, held_out).subset(VALIDATION_WINDOWS)
    mesh = make_mesh("", config.batch_size, 1)
    measure = make_bits_per_byte(model, config.batch_size, mesh)
    with jax.set_mesh(mesh):
        found = {"dense": measure(state, windows)}
        for name in FORMATS:
            try:
                found[name] = measure(with_format(state, layer, name), windows)
            except ConfigError as error:
                print(f"{name}: {error}", file=sys.stderr)
    return found


def with_format(state: TrainState, config: Any, name: str) -> TrainState:
    """The state with the experts' weights quantised and decoded, which are the values that the codes stand for."""
    params = dict(state.params)
    for block, leaves in params.items():
        if "experts" in leaves.get("mlp", {}):
            layer = leaves["mlp"] | {"router": leaves["mlp"]["router"] | bias_of(state, block)}
            experts = dequantize(quantize(layer, config, name), config)["experts"]
            params[block] = leaves | {"mlp": leaves["mlp"] | {"experts": experts}}
    return state._replace(params=params)


def bias_of(state: TrainState, block: str) -> dict[str, Any]:
    """The correction bias of a block's layer."""
    return dict(state.correction_bias[block]["mlp"]["router"])


def main():
    """Prints the table as Markdown."""
    trained = bits_per_byte(Path(sys.argv[1])) if len(sys.argv) > 1 else {}
    print(
        "| format | bits a weight | layer error, relu2 | layer error, swiglu | bits per byte |\n|---|---|---|---|---|"
    )
    if trained:
        print(f"| dense | 32 | 0 | 0 | {trained['dense']:.4f} |")
    for name in FORMATS:
        errors = " | ".join(f"{layer_error(config, name):.4f}" for config in LAYERS.values())
        bits = f"{trained[name]:.4f}" if name in trained else ""
        print(f"| {name} | {bits_per_weight(name):.3f} | {errors} | {bits} |", flush=True)


if __name__ == "__main__":
    with piped():
        main()
