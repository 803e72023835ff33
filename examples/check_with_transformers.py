"""Loads a folder of `examples.import_hf` in transformers and compares its MoE layers with what JAX computed.

    python examples/check_with_transformers.py FOLDER/balanced

Needs torch and transformers >= 5.3, and nothing of jax_latent_moe: run it in an environment of theirs.
"""

import pathlib
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]


def main(folder: pathlib.Path) -> int:
    """Prints each layer's relative error; returns 1 if one is above float32's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = np.load(folder / "expected.npz")
    status = 0
    for index, layer in enumerate(model.model.layers):
        with torch.no_grad():
            y = layer.mixer(torch.from_numpy(expected["x"])[None])[0].numpy()
        error = np.linalg.norm(y - expected[f"y{index}"]) / np.linalg.norm(y)
        print(f"layer {index}: relative error {error:.2e}")
        status |= int(not error < 1e-5)
    return status


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
