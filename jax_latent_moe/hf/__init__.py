"""Reads and writes published checkpoints, with the tensor names of the hub, of transformers 5 or of Megatron.

Families: NemotronH, Kimi K2 and K3, DeepSeek-V2, V3 and V4, GLM-4-MoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Mixtral,
gpt-oss.

Example::

    checkpoint = hf.open_checkpoint("Nemotron-3-Super")
    params = hf.import_layer(checkpoint, checkpoint.layers[0])
    y, aux = latent_moe(params, x, checkpoint.configs[checkpoint.layers[0]])

``python -m jax_latent_moe.hf`` does the same from a shell.
"""

from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf import names
from jax_latent_moe.hf.checkpoint import Checkpoint, LayerPlan, open_checkpoint, plan_layer
from jax_latent_moe.hf.exporting import differing_tensors, replace_layers, write_layers
from jax_latent_moe.hf.importing import import_layer, import_layers, import_token_experts
from jax_latent_moe.hf.names import Names

MEGATRON = names.MEGATRON
"""Megatron-LM's tensor names, for `write_layers`."""

__all__ = [
    "MEGATRON",
    "Checkpoint",
    "CheckpointError",
    "LayerPlan",
    "Names",
    "differing_tensors",
    "import_layer",
    "import_layers",
    "import_token_experts",
    "open_checkpoint",
    "plan_layer",
    "replace_layers",
    "write_layers",
]
