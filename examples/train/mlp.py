"""The feed-forwards to compare: a latent MoE, and a plain MoE and a dense one with the same active FLOPs."""

import math

from examples.train.config import Config, ModelConfig
from examples.train.errors import TrainError
from jax_latent_moe import InitConfig, LatentMoEConfig, ParallelConfig, Precision, RouterConfig
from jax_latent_moe.config import as_backend


def residual_scale(model: ModelConfig) -> float:
    """The scale of the kernels that write to the residual stream, which then starts with variance 1.

    Two kernels of each block write to it.
    """
    return 1 / math.sqrt(2 * model.layers)


def moe_config(config: Config) -> LatentMoEConfig | None:
    """The configuration of the MoE layer that `config.mlp` names. None for dense.

    "moe" has no latent width. As in the LatentMoE paper (arXiv 2601.18089), its experts have the FLOPs and parameters
    of the latent ones: num_experts and top_k shrink by latent_size / hidden_size. The latent model also has projections
    and a wider router. The shared expert of "moe" is wider by the same FLOPs.

    Raises:
        TrainError: the sizes of "moe" are not whole numbers.
        jax_latent_moe.errors.ConfigError: the sizes do not fit together.
    """
    model, mlp = config.model, config.mlp
    if mlp == "dense":
        return None
    d, latent = model.hidden_size, model.latent_size
    experts, top_k, shared = model.num_experts, model.top_k, model.shared_expert_intermediate_size
    if mlp == "moe":
        if experts * latent % d or top_k * latent % d or (experts - experts * latent // d) % 2:
            raise TrainError(
                f"--mlp moe multiplies model.num_experts={experts} and model.top_k={top_k} by latent_size / "
                f"hidden_size = {latent}/{d}: choose sizes that stay whole, and that remove an even number of experts."
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
            norm_topk_prob=top_k > 1,  # normalised, a single weight would always be 1
            routed_scaling_factor=model.routed_scaling_factor,
            switch_loss_coef=config.switch_loss_coef,
            sequence_loss_coef=config.sequence_loss_coef,
            bias_update=config.bias_update,
            bias_update_rate=config.bias_update_rate,
        ),
        init=InitConfig(output_scale=residual_scale(model), scale_expert_output=mlp == "moe"),
        dtype=model.dtype,
        backend=as_backend(model.backend),
        precision=Precision("fp8_block", "fp8_block") if config.precision == "fp8" else None,
        keep_gathered_rows=config.remat == "none" and config.precision != "fp8",
        parallel=ParallelConfig(),
    )


def dense_width(model: ModelConfig) -> int:
    """The inner width of a dense feed-forward with the active FLOPs of the latent MoE: router, projections, experts."""
    d, latent = model.hidden_size, model.latent_size
    routed = model.num_experts * d + 2 * d * latent + 2 * latent * model.top_k * model.expert_intermediate_size
    return model.shared_expert_intermediate_size + round(routed / (2 * d))
