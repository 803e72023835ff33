"""Latent mixture-of-experts layers for JAX.

The layer is a pure function, `latent_moe(params, x, config)`; Flax modules that hold its parameters are in
`jax_latent_moe.linen` and `jax_latent_moe.nnx`, which you import by name.
"""

from jax_latent_moe import cost, lora, parallel, presets
from jax_latent_moe.codes import encode_experts
from jax_latent_moe.config import (
    CutlassBackend,
    InitConfig,
    LatentMoEConfig,
    PallasBackend,
    PallasFp8Tile,
    PallasMatmulTile,
    PallasWgradTile,
    PallasWidenTile,
    ParallelConfig,
    Precision,
    RouterConfig,
    XlaBackend,
)
from jax_latent_moe.errors import ConfigError, InputError, LatentMoEError, NotCollectedWarning, UnsupportedError
from jax_latent_moe.lax import ragged_dot
from jax_latent_moe.layer import LatentMoEAux, latent_moe
from jax_latent_moe.params import init_params, param_axes, param_shapes
from jax_latent_moe.quantization import dequantize, quantize
from jax_latent_moe.routing.bias import update_correction_bias
from jax_latent_moe.routing.router import pin_choice
from jax_latent_moe.training import after_step, merge_state, split_state, total_loss, trainable_mask

__version__ = "0.2.0"

__all__ = [
    "ConfigError",
    "CutlassBackend",
    "InitConfig",
    "InputError",
    "LatentMoEAux",
    "LatentMoEConfig",
    "LatentMoEError",
    "NotCollectedWarning",
    "PallasBackend",
    "PallasFp8Tile",
    "PallasMatmulTile",
    "PallasWgradTile",
    "PallasWidenTile",
    "ParallelConfig",
    "Precision",
    "RouterConfig",
    "UnsupportedError",
    "XlaBackend",
    "after_step",
    "cost",
    "dequantize",
    "encode_experts",
    "init_params",
    "latent_moe",
    "lora",
    "merge_state",
    "parallel",
    "param_axes",
    "param_shapes",
    "pin_choice",
    "presets",
    "quantize",
    "ragged_dot",
    "split_state",
    "total_loss",
    "trainable_mask",
    "update_correction_bias",
]
