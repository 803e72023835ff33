"""Fine-tunes a layer of a checkpoint with low-rank adapters beside quantised experts (QLoRA, arXiv 2305.14314).

    python -m examples.fine_tune FOLDER

The example makes a small random checkpoint in FOLDER/original and imports its first layer. It encodes the experts in a
4-bit format and trains adapters on the experts and on both projections. The codes and all other weights stay as they
are. The layer learns the outputs of a teacher, which is the same layer with other projections. At the end the example
merges the adapters into dense weights and writes FOLDER/tuned. For a published model, start at `open_checkpoint`.
"""

import argparse
import os
import pathlib

import jax
import jax.numpy as jnp
import optax

from examples.import_hf import WIDTH, make_checkpoint
from jax_latent_moe import LatentMoEConfig, hf, latent_moe, lora, merge_state, quantize
from jax_latent_moe.piped import piped

FORMAT, RANK = "mxfp4", 4
STEPS, LEARNING_RATE, TOKENS = 150, 5e-3, 256


def teacher_of(params, key):
    """The layer that the adapters imitate: each projection has changed by a random matrix."""
    changed = dict(params)
    for name in ("down_proj", "up_proj"):
        kernel = params[name]["kernel"]
        change = jax.random.normal(jax.random.fold_in(key, len(name)), kernel.shape, kernel.dtype)
        changed[name] = {"kernel": kernel + 0.1 * change}
    return changed


def fine_tune(params, config: LatentMoEConfig, x: jax.Array, target: jax.Array):
    """The parameters with trained adapters, over frozen experts in `FORMAT`.

    Args:
        params: dense parameters of the layer.
        config: the layer.
        x: [t, d], the tokens to train on.
        target: [t, d], the outputs to learn.
    """
    adapted = lora.adapt(jax.random.key(1), quantize(params, config, FORMAT), config, rank=RANK)
    adapters, frozen = lora.split(adapted)
    optimizer = optax.adam(LEARNING_RATE)

    def error(adapters):
        y, _ = latent_moe(merge_state(adapters, frozen), x, config)
        return jnp.linalg.norm((y - target).astype(jnp.float32)) / jnp.linalg.norm(target.astype(jnp.float32))

    def step(carry, _):
        adapters, moments = carry
        before, gradient = jax.value_and_grad(error)(adapters)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(adapters, updates), moments), before

    (adapters, _), errors = jax.lax.scan(step, (adapters, optimizer.init(adapters)), length=STEPS)
    print(f"  relative error to the teacher: {errors[0]:.3f} before, {errors[-1]:.3f} after {STEPS} steps")
    return merge_state(adapters, frozen)


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="a new folder")
    folder = parser.parse_args(arguments).folder
    if os.path.lexists(folder):
        parser.error(f"{folder} exists already, and the example overwrites nothing: name a new folder.")
    make_checkpoint(folder / "original", latent=32, inner=32)  # mxfp4 encodes blocks of 32 inputs

    checkpoint = hf.open_checkpoint(folder / "original")
    layer = checkpoint.layers[0]
    config, params = checkpoint.configs[layer], hf.import_layer(checkpoint, layer, dtype="float32")
    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
    target, _ = jax.jit(latent_moe, static_argnums=2)(teacher_of(params, jax.random.key(2)), x, config)
    print(f"layer {layer}: imported, experts encoded in {FORMAT}, adapters of rank {RANK}")
    tuned = lora.merge(fine_tune(params, config, x, target), config)
    hf.replace_layers(checkpoint, [(layer, tuned)], folder / "tuned")
    print(f"wrote {folder / 'tuned'} with the adapters merged")


if __name__ == "__main__":
    with piped():
        main()
