"""Presets: a toy for tests, runs of minutes on a CPU and on a GPU, one for a GPU of 80 GB, one for a host of eight."""

import dataclasses

import jax
import jax.numpy as jnp

from examples.train.config import Config, ModelConfig, OptimizerConfig
from examples.train.mlp import dense_width, moe_config
from examples.train.model import BYTES
from jax_latent_moe.cost import parameters

PARAMETER_BYTES = 18
"""Memory of a parameter: its value, two moments and gradient in float32, and a copy in bfloat16."""

TOY = Config(
    preset="toy",
    steps=60,
    batch_size=8,
    log_every=10,
    eval_every=30,
    checkpoint_every=30,
    sample_bytes=80,
    model=ModelConfig(
        layers=2,
        hidden_size=32,
        heads=2,
        context=32,
        latent_size=16,
        num_experts=8,
        top_k=2,
        expert_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    optimizer=OptimizerConfig(warmup_steps=10),
)

CPU = Config(preset="cpu")

GPU = Config(
    preset="gpu",
    steps=1500,
    batch_size=32,
    eval_every=250,
    checkpoint_every=250,
    model=ModelConfig(
        layers=6,
        hidden_size=512,
        heads=8,
        context=512,
        latent_size=256,
        num_experts=16,
        top_k=4,
        expert_intermediate_size=512,
        shared_expert_intermediate_size=1024,
        dropout=0.1,
        dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
)

# The state of 1.8 G parameters takes 22 GB. The temporaries of 32 k tokens at once take 33 GiB. Both did not fit into
# the three quarters of the GPU that JAX reserves by default.
GPU_80GB = Config(
    preset="gpu-80gb",
    steps=20_000,
    batch_size=16,
    accumulate=2,
    eval_every=500,
    checkpoint_every=1000,
    model=ModelConfig(
        layers=12,
        hidden_size=2048,
        heads=16,
        context=2048,
        latent_size=512,
        num_experts=128,
        top_k=8,
        expert_intermediate_size=1024,
        shared_expert_intermediate_size=2048,
        dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=1000, b2=0.95),
    bias_update_rate=1e-3,
)

GPU_X8 = dataclasses.replace(
    GPU_80GB,
    preset="gpu-x8",
    batch_size=128,
    accumulate=2,
    mesh="expert=8",
    model=dataclasses.replace(GPU_80GB.model, layers=24, num_experts=256),
)

PRESETS = {config.preset: config for config in (TOY, CPU, GPU, GPU_80GB, GPU_X8)}


def preset(name: str) -> Config:
    """The preset of that name. "auto" is gpu if JAX finds a GPU, with parts that fit its memory, else cpu."""
    if name != "auto":
        return PRESETS[name]
    if jax.default_backend() != "gpu":
        return CPU
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return GPU if memory is None else dataclasses.replace(GPU, accumulate=parts_that_fit(GPU, memory))


def parts_that_fit(config: Config, memory: int) -> int:
    """The smallest number of equal parts of a batch such that one part fits beside the training state.

    The estimate of the activations was fitted to XLA's memory plans for models of 36 M, 270 M and 1.8 G parameters.

    Args:
        config: the options of a run on one GPU.
        memory: the memory of the GPU in bytes.
    """
    model, moe = config.model, moe_config(config)
    d, tokens = model.hidden_size, config.batch_size * model.context
    size, width = 2 * d * dense_width(model), 2 * dense_width(model)
    if moe:
        size, width = parameters(moe), 2 * moe.shared_expert_intermediate_size + moe.num_experts
        kept_rows = moe.expert_intermediate_size + moe.latent_width * moe.keep_gathered_rows
        width += moe.latent_width + moe.top_k * kept_rows
    state = PARAMETER_BYTES * (model.layers * (4 * d * d + size) + 2 * BYTES * d)
    kept = tokens * model.layers * (11 * d + width) * jnp.dtype(model.dtype).itemsize
    divisors = [parts for parts in range(1, config.batch_size + 1) if config.batch_size % parts == 0]
    return next((parts for parts in divisors if state + kept / parts <= 0.9 * memory), config.batch_size)
