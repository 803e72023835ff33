"""The feed-forwards that can be compared: a latent MoE, and a plain MoE and a dense one of equal active FLOPs."""

import math

from examples.train.config import Config, ModelConfig
from examples.train.errors import TrainError
from jax_latent_moe import InitConfig, LatentMoEConfig, ParallelConfig, RouterConfig
from jax_latent_moe.config import as_backend


def residual_scale(model: ModelConfig) -> float:
    """Factor on the kernels that write to the residual stream, two in each block, so that it starts with variance 1."""
    return 1 / math.sqrt(2 * model.layers)


def moe_config(config: Config) -> LatentMoEConfig | None:
    """The configuration of the MoE layer that `config.mlp` names; None for dense.

    "moe" has no latent width and, as in the LatentMoE paper (arXiv 2601.18089), the same expert FLOPs and parameters:
    experts and choices shrink by latent_size / hidden_size. What the latent model spends on its projections and its
    wider router goes to the shared expert.

    Raises:
        TrainError: "moe" would need a fraction of an expert.
        jax_latent_moe.errors.ConfigError: the sizes make no layer.
    """
    model, mlp = config.model, config.mlp
    if mlp == "dense":
        return None
    d, latent = model.hidden_size, model.latent_size
    experts, top_k, shared = model.num_experts, model.top_k, model.shared_expert_intermediate_size
    if mlp == "moe":
        if experts * latent % d or top_k * latent % d or (experts - experts * latent // d) % 2:
            raise TrainError(
                f"--mlp moe has model.num_experts and model.top_k times latent_size / hidden_size = {latent}/{d}: "
                f"{experts} and {top_k} must stay whole (and drop by an even number of experts)."
            )
        experts, top_k = experts * latent // d, top_k * latent // d
        shared += latent + (model.num_experts - experts) // 2
    return LatentMoEConfig(
        hidden_size=d,
        latent_size=None if mlp == "moe" else latent,
        num_experts=experts,
        top_k=top_k,
        expert_intermediate_size=model.expert_intermediate_size,
        shared_expert_intermediate_size=shared,
        activation="relu2",
        latent_norm="none" if mlp == "moe" else model.latent_norm,
        router=RouterConfig(
            norm_topk_prob=top_k > 1,  # a single weight, normalised, would be 1
            routed_scaling_factor=model.routed_scaling_factor,
            switch_loss_coef=config.switch_loss_coef,
            bias_update_rate=config.bias_update_rate,
        ),
        init=InitConfig(output_scale=residual_scale(model), scale_expert_output=mlp == "moe"),
        dtype=model.dtype,
        backend=as_backend(model.backend),
        parallel=ParallelConfig(),
    )


def dense_width(model: ModelConfig) -> int:
    """Inner width of a dense feed-forward with the active FLOPs of the latent MoE: router, projections, experts."""
    d, latent = model.hidden_size, model.latent_size
    routed = model.num_experts * d + 2 * d * latent + 2 * latent * model.top_k * model.expert_intermediate_size
    return model.shared_expert_intermediate_size + round(routed / (2 * d))
