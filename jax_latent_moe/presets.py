"""Published models as configurations of one MoE layer, taken from their released config files.

Change one with `dataclasses.replace(presets.KIMI_K3, dtype="float32")`.
"""

from jax_latent_moe.config import LatentMoEConfig, RouterConfig

TOY = LatentMoEConfig(
    hidden_size=64,
    latent_size=16,
    num_experts=8,
    top_k=2,
    expert_intermediate_size=32,
    shared_expert_intermediate_size=64,
)
"""Small enough for a test."""

NEMOTRON_3_SUPER = LatentMoEConfig(
    hidden_size=4096,
    latent_size=1024,
    num_experts=512,
    top_k=22,
    expert_intermediate_size=2688,
    shared_expert_intermediate_size=5376,
    router=RouterConfig(routed_scaling_factor=5.0),
)
"""NVIDIA Nemotron-3 Super 120B-A12B: 40 of its 88 layers."""

NEMOTRON_3_ULTRA = LatentMoEConfig(
    hidden_size=8192,
    latent_size=2048,
    num_experts=512,
    top_k=22,
    expert_intermediate_size=5120,
    shared_expert_intermediate_size=10240,
    router=RouterConfig(routed_scaling_factor=5.0),
)
"""NVIDIA Nemotron-3 Ultra 550B-A55B: 48 of its 108 layers."""

NEMOTRON_3_NANO = LatentMoEConfig(
    hidden_size=2688,
    latent_size=None,
    num_experts=128,
    top_k=6,
    expert_intermediate_size=1856,
    shared_expert_intermediate_size=3712,
    router=RouterConfig(routed_scaling_factor=2.5),
)
"""NVIDIA Nemotron-3 Nano 30B-A3B: no latent."""

KIMI_K3 = LatentMoEConfig(
    hidden_size=7168,
    latent_size=3584,
    num_experts=896,
    top_k=16,
    expert_intermediate_size=3072,
    shared_expert_intermediate_size=6144,
    activation="situ_glu",
    situ_beta=4.0,
    situ_linear_beta=25.0,
    latent_norm="post",
    latent_norm_eps=1e-5,
)
"""Moonshot Kimi K3: 92 of its 93 layers. Its two shared experts are one MLP of twice the width."""

DEEPSEEK_V3 = LatentMoEConfig(
    hidden_size=7168,
    latent_size=None,
    num_experts=256,
    top_k=8,
    expert_intermediate_size=2048,
    shared_expert_intermediate_size=2048,
    activation="swiglu",
    router=RouterConfig(routed_scaling_factor=2.5, num_groups=8, topk_groups=4),
)
"""DeepSeek-V3: no latent, 58 of its 61 layers."""

QWEN3_30B_A3B = LatentMoEConfig(
    hidden_size=2048,
    latent_size=None,
    num_experts=128,
    top_k=8,
    expert_intermediate_size=768,
    activation="swiglu",
    router=RouterConfig(score_function="softmax", correction_bias=False, norm_topk_eps=0.0),
)
"""Qwen3-30B-A3B: no latent, no shared expert, all of its 48 layers."""
