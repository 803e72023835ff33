"""Sizes to start from: a toy for tests, a run of minutes on two CPU cores, a run of minutes on one GPU."""

import jax

from examples.train.config import Config, ModelConfig, OptimizerConfig

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

PRESETS = {"toy": TOY, "cpu": CPU, "gpu": GPU}


def preset(name: str) -> Config:
    """The preset of that name; "auto" is gpu where JAX has one, else cpu."""
    if name == "auto":
        name = "gpu" if jax.default_backend() == "gpu" else "cpu"
    return PRESETS[name]
