"""Compares MoE layers in transformers with the outputs that JAX computed for `examples.import_hf`.

    python examples/check_with_transformers.py FOLDER/balanced

The script needs torch and transformers 5.3 or newer. It does not import jax_latent_moe, so it runs in an environment
without JAX.
"""

import pathlib
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]


def main(folder: pathlib.Path) -> int:
    """Prints the relative error of each layer. Returns 1 if an error exceeds 1e-5, else 0."""
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
